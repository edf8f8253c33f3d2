"""The language-model half of a checkpoint: its files, its checks and the jobs of its two graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fishrt.bundle.features import LanguageModel
from fishrt.language_model.drawing import frame_spec
from fishrt.language_model.sampling import audio_ids
from fishrt_engines.engine import GraphSpec

from ..checkpoint.config import ModelConfig, read_config
from ..checkpoint.families import Family, with_defaults
from ..checkpoint.files import read_weights
from ..checkpoint.forms.folder import Checkpoint
from ..checkpoint.identify import AudioIds, Evidence, find_ids, identify
from ..checkpoint.lora import merge
from ..checkpoint.quantised.decode import dequantised, whole_matrices
from ..checkpoint.quantised.integers import rows_of
from ..checkpoint.tokenizer import read_tokenizer, read_vocabulary
from ..checkpoint.weights import (
    Lazy,
    expected_shapes,
    find_problems,
    flat_names,
    load,
    makers,
    on_meta,
    raise_if_any,
)
from ..graph.job import GraphJob
from ..graph.recipe import Storage
from ..models.fast_ar import FastAR, fast_ar_spec
from ..models.frame import Frame
from ..models.slow_ar import SlowAR, slow_ar_spec
from ..options import Lora
from .cases import FRAMES, fast_ar_cases, frame_cases, slow_ar_cases

LANGUAGE_MODEL_TOLERANCE = 5e-4
SPEECH_ROOM = 2048
"""Positions that prompts leave for speech, as in the originals of S1 and S2; at most half of the model's positions."""

_PROJECTION = "fast_project_in."


@dataclass(frozen=True, slots=True)
class LanguageModelSource:
    """The dual-AR half of a checkpoint, with weights by flat names."""

    config: ModelConfig
    family: Family
    ids: AudioIds
    tokenizer: str
    """The text of the `tokenizer.json`."""
    weights: Mapping[str, Tensor]
    """Tensors of safetensors files are read when they are looked up."""

    def problems(self) -> list[str]:
        """Return all differences between weights and config."""
        return find_problems(_shapes(self.config), self.weights)

    def describe(self, head: str) -> LanguageModel:
        """Return the manifest's entry. head: one of features.HEADS."""
        family, width, positions = self.family, self.config.codebook_width, self.config.max_seq_len
        return LanguageModel(
            kind="dual_ar",
            num_codebooks=self.config.num_codebooks,
            codebook_width=width,
            max_seq_len=positions,
            max_prompt=positions - min(SPEECH_ROOM, positions // 2),
            history_window=family.history_window,
            head=head,
            main_tokens=family.main_tokens if head == "full" else "audio",
            vocab_size=self.config.vocab_size,
            semantic_begin_id=self.ids.semantic[0],
            semantic_end_id=self.ids.semantic[-1],
            end_id=self.ids.end,
            code_zero=family.code_zero,
            code_offset=family.code_offset,
            fast_candidates=width if family.fast_candidates is None else min(family.fast_candidates, width),
            zero_codes_off_audio=family.zero_codes_off_audio,
            prompt_dialect=family.prompt_dialect,
            cleaning=family.cleaning,
            splitting=family.splitting,
            chunk_bytes=family.chunk_bytes,
            upstream_trim=family.upstream_trim,
            sampling=family.sampling,
            voice_seconds=family.voice_seconds,
            reads=family.reads,
        )

    @property
    def audio_head(self) -> list[int]:
        """Return the token id of each row of the audio head."""
        return [int(token) for token in audio_ids(self.describe("audio"))]

    def jobs(self, head: str) -> list[GraphJob]:
        """Return the jobs of slow_ar and fast_ar. head: one of features.HEADS."""
        return [
            GraphJob(
                role="slow_ar",
                spec=self._slow_spec(head),
                build=lambda: on_meta(self._slow_module(head)),
                weights=self.slow_weights(head),
                cases=slow_ar_cases(self.config, self.ids),
                tolerance=LANGUAGE_MODEL_TOLERANCE,
            ),
            GraphJob(
                role="fast_ar",
                spec=fast_ar_spec(self.config),
                build=lambda: on_meta(self._fast_module()),
                weights=self.fast_weights(),
                cases=fast_ar_cases(self.config, self.config.fast.dim),
                tolerance=LANGUAGE_MODEL_TOLERANCE,
            ),
        ]

    def frame_job(self, lm: LanguageModel, plan: Mapping[str, Storage]) -> GraphJob:
        """Return the job of the frame graph, which runs after the fast AR's in the same folder, and refers to its weights.

        lm: from `describe`. plan: of the fast AR's job.
        """
        fast = fast_ar_spec(self.config)
        spec = frame_spec(self._slow_spec(lm.head), fast, lm)
        return GraphJob(
            role="frame",
            spec=spec,
            build=lambda: Frame(on_meta(self._fast_module()), lm, spec),
            weights=Lazy({f"fast.{name}": make for name, make in makers(self.fast_weights()).items()}),
            cases=frame_cases(lm, spec),
            tolerance=1 / FRAMES,  # rounding may decide a draw between equals
            dims={"main_ranked": 2, "code_ranked": 1},
            plan={f"fast.{name}": storage for name, storage in plan.items()},
            stored_in=fast.file,
        )

    def slow_ar(self, head: str) -> SlowAR:
        """Return the slow AR's module with its weights, in float32."""
        return load(self._slow_module(head), self.slow_weights(head))

    def fast_ar(self) -> FastAR:
        """Return the fast AR's module with its weights, in float32."""
        return load(self._fast_module(), self.fast_weights())

    def slow_weights(self, head: str) -> Mapping[str, Tensor]:
        """Return the tensors under the names of SlowAR. The audio head has the rows of the tokens that can be spoken."""
        weights = {name: make for name, make in makers(self.weights).items() if not _is_fast(name)}
        if head == "audio":
            table = weights["embeddings.weight"] if self.config.tied_head else weights["output.weight"]
            weights["output.weight"] = rows_of(table, torch.tensor(self.audio_head))
        return Lazy(weights)

    def fast_weights(self) -> Mapping[str, Tensor]:
        """Return the tensors under the names of FastAR."""
        return Lazy({name.removeprefix("fast_"): make for name, make in makers(self.weights).items() if _is_fast(name)})

    def _slow_spec(self, head: str) -> GraphSpec:
        return slow_ar_spec(self.config, self.config.vocab_size if head == "full" else len(self.audio_head))

    def _slow_module(self, head: str) -> SlowAR:
        if head == "audio":
            size: int | None = len(self.audio_head)
        else:
            size = None if self.config.tied_head else self.config.vocab_size
        with torch.device("meta"):
            return SlowAR(self.config, self.ids.semantic, size)

    def _fast_module(self) -> FastAR:
        with torch.device("meta"):
            return FastAR(self.config)


def open_language_model(
    checkpoint: Checkpoint | Path, *, family: str | None = None, codec: str | None = None, lora: Lora | None = None
) -> LanguageModelSource:
    """Read config, tokenizer and weights, and merge the LoRA.

    family: a key of FAMILIES; None identifies it. codec: the kind of the checkpoint's codec, see CodecSource.kind.
    Raises ExportError for files that are missing, unreadable or of several families. `problems` returns the other faults.
    """
    if isinstance(checkpoint, Path):
        checkpoint = Checkpoint.of(checkpoint)
    files = checkpoint.language_model()
    vocabulary = None if files.tokenizer_text is None else read_vocabulary(files.tokenizer_text, files.tokenizer)
    known = with_defaults(identify(Evidence(files.config, vocabulary, codec), family), checkpoint.folder)
    tokenizer = files.tokenizer_text or read_tokenizer(files.tokenizer, known)
    config = read_config(files.config, known)
    ids = find_ids(files.config, read_vocabulary(tokenizer, files.tokenizer), config.vocab_size, known)
    shapes = _shapes(config)
    stored = dequantised(flat_names(read_weights(files.weights)), files.form, shapes)
    weights = whole_matrices(stored, tied_head=config.tied_head)
    if lora is not None:
        raise_if_any(find_problems(shapes, weights))  # merging would hide them
        weights = merge(weights, lora)
        # Which languages it was made for, nobody says.
        known = replace(known, reads=replace(known.reads, languages=(), characters=None))
    return LanguageModelSource(config, known, ids, tokenizer, weights)


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the language model, by flat names."""
    with torch.device("meta"):
        slow = SlowAR(config, range(1), None if config.tied_head else config.vocab_size)
        return expected_shapes(slow) | expected_shapes(FastAR(config), "fast_")


def _is_fast(name: str) -> bool:
    return name.startswith("fast_") and not name.startswith(_PROJECTION)
