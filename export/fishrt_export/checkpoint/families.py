"""Facts about each family that no checkpoint file states, above all its prompts and its sampling.

A checkpoint folder may hold fishrt's own file `fishrt.json`, with defaults that replace the family's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fishrt.bundle.features import (
    VOICE_SECONDS,
    PunctuationSplit,
    Reads,
    RepetitionAware,
    RepetitionPenalty,
    SamplingDefaults,
    TextCleaning,
)
from fishrt.bundle.strict import parse_dataclass
from fishrt.errors import BundleError

from ..errors import ExportError
from .content import read_json
from .names import DEFAULTS


@dataclass(frozen=True, slots=True)
class Release:
    """A published checkpoint."""

    title: str
    licence: str
    """Licence of the published weights, as the publisher's model card states it."""
    repository: str
    """Hugging Face repository of the official checkpoint."""
    files: str
    """Files of the repository that an export needs."""


@dataclass(frozen=True, slots=True)
class Family(Release):
    """Releases that share prompts and sampling. Fields from `main_tokens` on go into the manifest as they are."""

    name: str
    codec: str
    """Kind of the codec; see CodecSource.kind."""
    honours: tuple[str, ...]
    """Fields of config.json that this family honours and another ignores. If head_dim is not among them, it is dim // n_head."""
    control_tokens: tuple[str, ...]
    """Tokens that follow the ranks of a `tokenizer.tiktoken`, in the order of ids. Empty for a `tokenizer.json`."""
    lists_control_tokens: bool
    """Whether a `special_tokens.json` replaces `control_tokens`."""
    main_tokens: str
    """Tokens that can be drawn with the full head; the audio head always has "audio"."""
    code_zero: str
    code_offset: int
    fast_candidates: int | None
    """None: all."""
    zero_codes_off_audio: bool
    prompt_dialect: str
    cleaning: TextCleaning | None
    splitting: PunctuationSplit | None
    chunk_bytes: int
    history_window: int | None
    upstream_trim: str
    sampling: SamplingDefaults
    reads: Reads
    """Languages as the publisher's model card lists them."""
    voice_seconds: tuple[float, ...] = VOICE_SECONDS

    @property
    def one_semantic(self) -> bool:
        """Return whether one token, `<|semantic|>`, stands for every frame."""
        return self.code_zero == "fast"


def _penalised(temperature: float, top_p: float, penalty: float, main: str) -> SamplingDefaults:
    return SamplingDefaults(
        temperature=temperature,
        top_p=top_p,
        top_k=None,
        repetition_aware=None,
        repetition_penalty=RepetitionPenalty(penalty=penalty, window=16, main=main),
    )


def _named(names: str) -> tuple[str, ...]:
    return tuple(f"<|{name}|>" for name in names.split())


_SEMANTIC = tuple(f"<|semantic:{i}|>" for i in range(4096))
_EMOJI = ((0x1F600, 0x1F64F), (0x1F300, 0x1F5FF), (0x1F680, 0x1F6FF), (0x1F1E0, 0x1F1FF))

S2 = Family(
    name="s2",
    title="Fish Audio S2-Pro",
    licence="Fish Audio Research License",
    repository="fishaudio/s2-pro",
    files="config.json, model.safetensors.index.json and the shards it names, tokenizer.json, codec.pth",
    codec="dac",
    honours=("head_dim", "scale_codebook_embeddings", "norm_fastlayer_input"),
    control_tokens=(),
    lists_control_tokens=False,
    main_tokens="audio",
    code_zero="main",
    code_offset=0,
    fast_candidates=None,
    zero_codes_off_audio=False,
    prompt_dialect="conversation",
    cleaning=None,
    splitting=None,
    chunk_bytes=300,
    history_window=None,
    upstream_trim="last",
    sampling=SamplingDefaults(
        temperature=1.0,
        top_p=0.9,
        top_k=30,
        repetition_aware=RepetitionAware(window=10, temperature=1.0, top_p=0.9),
        repetition_penalty=None,
    ),
    reads=Reads(languages=(), characters=None, tags=("[]",)),  # more than 80 languages
)

S1 = replace(
    S2,
    name="s1",
    title="OpenAudio S1-mini",
    licence="CC-BY-NC-SA-4.0",
    repository="fishaudio/openaudio-s1-mini",
    files="config.json, model.pth, tokenizer.tiktoken, special_tokens.json, codec.pth",
    honours=("head_dim", "scale_codebook_embeddings"),
    control_tokens=(
        *_named("begin_of_text end_of_text pad im_start im_end phoneme_start phoneme_end tool_call_start tool_call_end"),
        *_named("text voice interleave audio_start audio_end audio"),
        *_SEMANTIC,
    ),
    lists_control_tokens=True,
    main_tokens="any",
    fast_candidates=1024,
    prompt_dialect="interleaved",
    sampling=_penalised(temperature=0.8, top_p=0.8, penalty=1.1, main="oldest_column"),
    reads=Reads(tuple("en zh ja de fr es ko ar ru nl it pl pt".split()), characters=None, tags=("()",)),
)

FISH_1_5 = replace(
    S1,
    name="1.5",
    title="Fish Speech 1.5",
    repository="fishaudio/fish-speech-1.5",
    files="config.json, model.pth, tokenizer.tiktoken, firefly-gan-vq-fsq-8x1024-21hz-generator.pth",
    codec="firefly",
    honours=("share_codebook_embeddings",),
    control_tokens=(
        *_named("begin_of_text end_of_text pad im_start im_end placeholder:0 placeholder:1 placeholder:2 placeholder:3"),
        *_named("text voice interleave"),
        *_SEMANTIC[:1024],
    ),
    lists_control_tokens=False,
    fast_candidates=None,
    prompt_dialect="instruction",
    cleaning=TextCleaning(replace=dict.fromkeys("‘’", "'"), keep=None, drop=_EMOJI, collapse=","),
    splitting=PunctuationSplit(sentence_ends=".!?。！？", clause_ends=",，"),
    chunk_bytes=200,
    history_window=3072,
    upstream_trim="first",
    sampling=_penalised(temperature=0.7, top_p=0.7, penalty=1.2, main="row"),
    reads=replace(S1.reads, tags=()),
)

FISH_1_4 = replace(
    FISH_1_5,
    name="1.4",
    title="Fish Speech 1.4",
    repository="fishaudio/fish-speech-1.4",
    files="config.json, model.pth, tokenizer.json, firefly-gan-vq-fsq-8x1024-21hz-generator.pth",
    honours=(),
    control_tokens=(),
    code_zero="fast",
    code_offset=1,
    zero_codes_off_audio=True,
    prompt_dialect="segments",
    cleaning=TextCleaning(
        replace={
            **dict.fromkeys("：；;:", ","),
            **dict.fromkeys("“”‘’「」《》", "'"),
            **dict.fromkeys("【】[]（）()・·—～~\n", ""),
            "…": ".",
        },
        keep=None,
        drop=_EMOJI,
        collapse=".,",
    ),
    upstream_trim="last",
    sampling=_penalised(temperature=0.7, top_p=0.7, penalty=1.2, main="none"),
    reads=Reads(tuple("en zh de ja fr es ko ar".split()), characters=None, tags=()),
)

FISH_1_2 = replace(
    FISH_1_4,
    name="1.2",
    title="Fish Speech 1.2-SFT",
    repository="fishaudio/fish-speech-1.2-sft",
    files="config.json, model.pth, tokenizer.json, firefly-gan-vq-fsq-4x1024-42hz-generator.pth",
    codec="centred firefly",
    zero_codes_off_audio=False,
    cleaning=TextCleaning(
        replace={
            **dict.fromkeys("：；，·、;:", ","),
            **dict.fromkeys("。\n", "."),
            "！": "!",
            "？": "?",
            "...": "…",  # outside `keep`, so it is dropped next
            **dict.fromkeys("“”‘’（）()《》【】[]「」", "'"),
            **dict.fromkeys("—～~・", "-"),
        },
        # ASCII, CJK ideographs, hiragana, katakana and its extensions.
        keep=((0x00, 0x7F), (0x4E00, 0x9FFF), (0x3040, 0x309F), (0x30A0, 0x30FF), (0x31F0, 0x31FF)),
        drop=(),
        collapse="",
    ),
    splitting=PunctuationSplit(sentence_ends=".!?", clause_ends=","),
    history_window=1024,
    sampling=_penalised(temperature=0.7, top_p=0.7, penalty=1.2, main="row"),
    reads=Reads(("en", "zh", "ja"), characters=None, tags=()),
)

ECHO = Release(
    title="Echo-TTS",
    licence="CC-BY-NC-SA-4.0",
    repository="jordand/echo-tts-base",
    files="pytorch_model.safetensors, pca_state.safetensors, and the codec of jordand/fish-s1-dac-min",
)
FAMILIES = {family.name: family for family in (S2, S1, FISH_1_5, FISH_1_4, FISH_1_2)}


@dataclass(frozen=True, slots=True)
class Defaults:
    """The content of `fishrt.json`; see the manifest's entries of these names."""

    chunk_bytes: int
    sampling: SamplingDefaults
    voice_seconds: tuple[float, ...] = VOICE_SECONDS
    reads: Reads | None = None
    """None: those of the family."""


def with_defaults(family: Family, checkpoint: Path) -> Family:
    """Return the family with the defaults of the checkpoint's `fishrt.json`, if there is one. Raises ExportError.

    The manifest checks the values.
    """
    path = checkpoint / DEFAULTS
    if not path.exists():
        return family
    try:
        own = parse_dataclass(Defaults, read_json(path), DEFAULTS)
    except BundleError as error:
        raise ExportError(f"{path} is not valid: {error}", hint="mend it, or take it away to use the family's defaults") from None
    reads = own.reads or family.reads
    return replace(family, chunk_bytes=own.chunk_bytes, sampling=own.sampling, voice_seconds=own.voice_seconds, reads=reads)
