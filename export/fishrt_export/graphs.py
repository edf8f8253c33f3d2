"""From a checkpoint to its graphs: opens each half, checks all of it, and says for each graph what is traced and verified."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from fishrt.bundle import Codec, LanguageModel, Parity
from fishrt.sampling import audio_ids
from fishrt_engines.spec import GraphSpec

from .cases import codec_decode_cases, codec_encode_cases, fast_ar_cases, slow_ar_cases
from .checkpoint import find_codec, find_language_model, read_weights
from .codec.dac import MAX_FRAMES, Dac, DacConfig
from .codec.graphs import CodecDecode, CodecEncode, codec_decode_spec, codec_encode_spec
from .codec.load import fingerprint, fuse_codec, read_codec_config, read_stored_codec
from .codec.margins import code_margins
from .config import ModelConfig, read_config
from .errors import ExportError
from .families import AudioIds, Family, find_ids, identify, read_vocabulary, with_defaults
from .fast_ar import FastAR, fast_ar_spec
from .slow_ar import SlowAR, slow_ar_spec
from .trace import Derived, export_graph
from .verify import Case, Margins, verify
from .weights import expected_shapes, find_problems, flat_names, load

HEADS = ("audio", "full")
LANGUAGE_MODEL_TOLERANCE = 5e-4
AUDIO_TOLERANCE = 1e-4

_PROJECTION = "fast_project_in."


@dataclass(frozen=True, slots=True)
class GraphJob:
    """One graph to be made."""

    role: str
    spec: GraphSpec
    build: Callable[[], nn.Module]
    """Makes the torch module with its weights in float32."""
    weights: Mapping[str, Tensor]
    """By the module's names, as the checkpoint holds them."""
    cases: list[Case]
    tolerance: float
    derived: Derived = field(default_factory=dict)
    margins: Callable[[nn.Module], Margins] | None = None

    def run(self, folder: Path, stage: Callable[[str], None] = lambda _: None) -> Parity:
        """Writes the graph into `folder` and verifies it. Raises ExportError."""
        module = self.build()
        stage("tracing")
        export_graph(module, self.spec, folder, {name: tensor.dtype for name, tensor in self.weights.items()}, self.derived)
        stage("verifying")
        return verify(module, self.spec, folder, self.cases, self.tolerance, self.margins and self.margins(module))


@dataclass(frozen=True, slots=True)
class LanguageModelSource:
    """The dual-AR half of a checkpoint, with weights by flat names."""

    config: ModelConfig
    family: Family
    ids: AudioIds
    tokenizer: Path
    weights: Mapping[str, Tensor]

    def problems(self) -> list[str]:
        """In what the weights do not fit the config."""
        with torch.device("meta"):
            slow, fast = self._slow_module("full"), FastAR(self.config)
        return find_problems(expected_shapes(slow) | expected_shapes(fast, "fast_"), self.weights)

    def describe(self, head: str) -> LanguageModel:
        """The manifest's entry."""
        return LanguageModel(
            num_codebooks=self.config.num_codebooks,
            codebook_width=self.config.codebook_width,
            max_seq_len=self.config.max_seq_len,
            head=head,
            vocab_size=self.config.vocab_size,
            semantic_begin_id=self.ids.semantic[0],
            semantic_end_id=self.ids.semantic[-1],
            end_id=self.ids.end,
            prompt_dialect=self.family.prompt_dialect,
            chunk_bytes=self.family.chunk_bytes,
            sampling=self.family.sampling,
        )

    @property
    def audio_head(self) -> list[int]:
        """The token of each row of the audio head."""
        return [int(token) for token in audio_ids(self.describe("audio"))]

    def jobs(self, head: str) -> list[GraphJob]:
        """slow_ar and fast_ar. Raises ExportError for an unknown head."""
        if head not in HEADS:
            raise ExportError(f"unknown head {head!r}", hint=f"choose one of: {', '.join(HEADS)}")
        slow, fast = self.slow_weights(head), self.fast_weights()
        head_size = self.config.vocab_size if head == "full" else len(self.audio_head)
        return [
            GraphJob(
                role="slow_ar",
                spec=slow_ar_spec(self.config, head_size),
                build=lambda: self.slow_ar(head),
                weights=slow,
                cases=slow_ar_cases(self.config, self.ids),
                tolerance=LANGUAGE_MODEL_TOLERANCE,
            ),
            GraphJob(
                role="fast_ar",
                spec=fast_ar_spec(self.config),
                build=self.fast_ar,
                weights=fast,
                cases=fast_ar_cases(self.config),
                tolerance=LANGUAGE_MODEL_TOLERANCE,
            ),
        ]

    def slow_ar(self, head: str) -> SlowAR:
        """The module, in float32."""
        with torch.device("meta"):
            module = self._slow_module(head)
        return load(module, self.slow_weights(head))

    def fast_ar(self) -> FastAR:
        """The module, in float32."""
        with torch.device("meta"):
            module = FastAR(self.config)
        return load(module, self.fast_weights())

    def slow_weights(self, head: str) -> dict[str, Tensor]:
        """By the names of SlowAR. The audio head holds the rows of the tokens that can be spoken, whether tied or not."""
        weights = {name: tensor for name, tensor in self.weights.items() if not _is_fast(name)}
        if head == "audio":
            table = weights["embeddings.weight"] if self.config.tied_head else weights["output.weight"]
            weights["output.weight"] = table[self.audio_head]
        return weights

    def fast_weights(self) -> dict[str, Tensor]:
        """By the names of FastAR."""
        return {name.removeprefix("fast_"): tensor for name, tensor in self.weights.items() if _is_fast(name)}

    def _slow_module(self, head: str) -> SlowAR:
        if head == "audio":
            size: int | None = len(self.audio_head)
        else:
            size = None if self.config.tied_head else self.config.vocab_size
        return SlowAR(self.config, self.ids.semantic, size)


@dataclass(frozen=True, slots=True)
class CodecSource:
    """The codec half of a checkpoint, with weights by the names of Dac."""

    config: DacConfig
    weights: Mapping[str, Tensor]
    fingerprint: str

    def problems(self) -> list[str]:
        """In what the weights do not fit the config."""
        with torch.device("meta"):
            module = Dac(self.config)
        return find_problems(expected_shapes(module), self.weights)

    def describe(self) -> Codec:
        """The manifest's entry."""
        return Codec(
            sample_rate=self.config.sample_rate,
            hop=self.config.hop,
            codebook_sizes=self.config.codebook_sizes,
            max_frames=MAX_FRAMES,
            fingerprint=self.fingerprint,
        )

    def dac(self) -> Dac:
        """The module, in float32."""
        with torch.device("meta"):
            module = Dac(self.config)
        return load(module, self.weights)

    def jobs(self) -> list[GraphJob]:
        """codec_encode and codec_decode."""
        derived = {"samples": (self.config.hop, "frames")}
        return [
            GraphJob(
                role="codec_encode",
                spec=codec_encode_spec(self.config),
                build=lambda: CodecEncode(self.dac()),
                weights=self.weights,
                cases=codec_encode_cases(self.config),
                tolerance=AUDIO_TOLERANCE,
                derived=derived,
                margins=code_margins,
            ),
            GraphJob(
                role="codec_decode",
                spec=codec_decode_spec(self.config),
                build=lambda: CodecDecode(self.dac()),
                weights=self.weights,
                cases=codec_decode_cases(self.config),
                tolerance=AUDIO_TOLERANCE,
                derived=derived,
            ),
        ]


def open_language_model(folder: Path) -> LanguageModelSource:
    """Reads config, tokenizer and weights. Raises ExportError for what is missing or unreadable; `problems` tells the rest."""
    files = find_language_model(folder)
    config = read_config(files.config)
    vocabulary = read_vocabulary(files.tokenizer)
    family = with_defaults(identify(files.config, vocabulary), folder)
    ids = find_ids(files.config, vocabulary, config.vocab_size)
    weights = flat_names(read_weights(files.weights), tied_head=config.tied_head)
    return LanguageModelSource(config, family, ids, files.tokenizer, weights)


def open_codec(folder: Path) -> CodecSource:
    """Reads the codec. Raises ExportError for what is missing or unreadable; `problems` tells the rest."""
    files = find_codec(folder)
    config = read_codec_config(files)
    weights = fuse_codec(read_stored_codec(files))
    return CodecSource(config, weights, fingerprint(weights, config))


def _is_fast(name: str) -> bool:
    return name.startswith("fast_") and not name.startswith(_PROJECTION)
