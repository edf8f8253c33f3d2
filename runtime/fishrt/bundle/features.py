"""The differences between families, as data: the part of a manifest for prompts, sampling and decoding.

Export fills these in; the runtime branches on them and never asks which release it is running.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

HEADS = ("audio", "full")
MAIN_TOKENS = ("audio", "any")
CODE_ZERO = ("main", "fast")
DIALECTS = ("conversation", "instruction", "segments", "interleaved")
PENALISED_MAIN = ("row", "oldest_column", "none")
TAGS = ("[]", "()")
TRIMS = ("last", "first")
VOICE_SECONDS = (10.0, 30.0)
"""The official models' `LanguageModel.voice_seconds`."""


@dataclass(frozen=True, slots=True)
class Quirks:
    """Behaviour of the original to the letter, where fishrt does otherwise. Without arguments: none of it."""

    text: bool = False
    """Texts are cleaned and nothing else: no full stop is added, no turn is split, letters are dropped, control tokens act."""
    history: bool = False
    """All earlier pieces stay in the prompt, as the original writes them."""
    sound: bool = False
    """The codec begins from zeros, and no voice is brought to the common loudness."""
    draws: bool = False
    """Padding may be drawn instead of a code, and an end token in the first column does not stop."""
    trim: str | None = None
    """The column that is not spoken, "first" or "last", whatever it is; None: that of the end token."""

    @classmethod
    def of(cls, lm: LanguageModel) -> Quirks:
        """Return all quirks of the original of a model."""
        return cls(text=True, history=True, sound=True, draws=True, trim=lm.upstream_trim)


USUAL = Quirks()


@dataclass(frozen=True, slots=True)
class RepetitionAware:
    """Repetition-aware sampling: a token seen in the last `window` frames is drawn again with these settings."""

    window: int
    temperature: float
    top_p: float


@dataclass(frozen=True, slots=True)
class RepetitionPenalty:
    """Repetition penalty: ids seen in the last `window` frames are made less likely, by the factor `penalty` on their logits.

    Not for the frame of the prefill, which never enters the window either. Until `window` further frames are drawn, the missing
    ones count as columns of zeros, so that id 0 is penalised too. Codes are penalised by their own codebook's row.
    """

    penalty: float
    window: int
    main: str
    """The penalised main tokens. "row": those of the window. "oldest_column": all values of the oldest column in the window, main
    token and codes alike, taken as token ids. "none": none."""


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Settings of a request that gives none."""

    temperature: float
    top_p: float
    top_k: int | None
    """None: every token may be drawn."""
    repetition_aware: RepetitionAware | None
    repetition_penalty: RepetitionPenalty | None


@dataclass(frozen=True, slots=True)
class TextCleaning:
    """Changes to text before it becomes tokens, in the order of the fields; white space at both ends is stripped first."""

    replace: dict[str, str]
    """Replaced in one pass from left to right; if several keys match, the first in this order wins."""
    keep: tuple[tuple[int, ...], ...] | None
    """Ranges of code points, first and last; all others are dropped. None: all are kept."""
    drop: tuple[tuple[int, ...], ...]
    """Ranges of code points that are dropped."""
    collapse: str
    """Runs of two or more of these characters, mixed, become the first of the run."""


@dataclass(frozen=True, slots=True)
class PunctuationSplit:
    """Splitting of long text after punctuation, without regard to abbreviations or markup."""

    sentence_ends: str
    """Characters after which a sentence ends."""
    clause_ends: str
    """Characters after which a sentence that is too long is cut."""


@dataclass(frozen=True, slots=True)
class Reads:
    """Text that the model reads well. Other text is spoken, with a warning."""

    languages: tuple[str, ...]
    """BCP 47 codes. Empty: unknown."""
    characters: str | None
    """Letters, digits and signs, in lower case. None: letters of the languages' scripts, and all digits and signs."""
    tags: tuple[str, ...]
    """Forms of tags that change how it speaks: "[]" as in [laughing], "()" as in (laughing). Other tags are read as words."""


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """Ids and rules of the dual-AR model."""

    kind: Literal["dual_ar"]
    num_codebooks: int
    """If the codec has more, the model uses the first ones."""
    codebook_width: int
    """Entries of the fast AR's table and head; a codebook of the codec may hold fewer or more."""
    max_seq_len: int
    """Positions that the slow AR was trained for: prompt and generated frames together."""
    max_prompt: int
    """Most columns of a prompt that leaves room for speech."""
    history_window: int | None
    """Columns of a prompt within which the original keeps earlier pieces. None: it keeps all, or speaks all text as one piece."""
    head: str
    """"audio": logits of the end token and the semantic tokens only, in the order of their ids. "full": of every token."""
    main_tokens: str
    """Tokens that may be drawn. "audio": the end token and the semantic tokens only. "any": every token of the vocabulary."""
    vocab_size: int
    semantic_begin_id: int
    semantic_end_id: int
    """The same as semantic_begin_id if one token stands for every frame."""
    end_id: int
    """The token that ends an utterance, `<|im_end|>`."""
    code_zero: str
    """Source of code 0. "main": the main token − semantic_begin_id. "fast": the fast AR's first logits."""
    code_offset: int
    """Added to codes in prompts, and in the fast AR: 1 if 0 stands for padding."""
    fast_candidates: int
    """Only ids below this are drawn from the fast AR's logits."""
    zero_codes_off_audio: bool
    """A column whose main token is not semantic gets the codes 0."""
    prompt_dialect: str
    """Form of a prompt, one of DIALECTS; see prompt.py."""
    cleaning: TextCleaning | None
    """None: text is not changed."""
    splitting: PunctuationSplit | None
    """Splitting of long text. None: at sentence ends, with regard to abbreviations, markup and speaker tags."""
    chunk_bytes: int
    """UTF-8 bytes of text after which a new piece begins."""
    upstream_trim: str
    """The column that the original drops from its output: the "last", end token or not, or the "first"."""
    sampling: SamplingDefaults
    voice_seconds: tuple[float, ...] = VOICE_SECONDS
    """Shortest and longest recording that the model imitates well, in seconds."""
    reads: Reads | None = None
    """None: unknown, so there are no warnings."""

    def faults(self) -> Iterator[str]:
        """Yield a message for each value that is out of range or contradicts another."""
        sampling = self.sampling
        aware, penalty = sampling.repetition_aware, sampling.repetition_penalty
        counts = {
            "num_codebooks": self.num_codebooks,
            "codebook_width": self.codebook_width,
            "max_seq_len": self.max_seq_len,
            "max_prompt": self.max_prompt,
            **({"history_window": self.history_window} if self.history_window is not None else {}),
            "vocab_size": self.vocab_size,
            "fast_candidates": self.fast_candidates,
            "chunk_bytes": self.chunk_bytes,
            **({"repetition_aware.window": aware.window} if aware else {}),
            **({"repetition_penalty.window": penalty.window} if penalty else {}),
        }
        yield from (f"{name} is {count}, below 1" for name, count in counts.items() if count < 1)
        choices = (
            ("head", self.head, HEADS),
            ("main_tokens", self.main_tokens, MAIN_TOKENS),
            ("code_zero", self.code_zero, CODE_ZERO),
            ("prompt_dialect", self.prompt_dialect, DIALECTS),
            ("upstream_trim", self.upstream_trim, TRIMS),
            *((("repetition_penalty.main", penalty.main, PENALISED_MAIN),) if penalty else ()),
        )
        choices += tuple(("reads.tags", form, TAGS) for form in (self.reads.tags if self.reads else ()))
        yield from (f"{name} is {value!r}; known are {', '.join(known)}" for name, value, known in choices if value not in known)
        settings = [("sampling", (sampling.temperature, sampling.top_p, sampling.top_k, penalty and penalty.penalty))]
        if aware:
            settings.append(("repetition_aware", (aware.temperature, aware.top_p, None, None)))
        yield from (f"{where}.{what}; {rule}" for where, values in settings for what, rule in sampling_faults(*values))
        begin, end = self.semantic_begin_id, self.semantic_end_id
        if not 0 <= begin <= end < self.vocab_size:
            yield f"semantic ids are {begin} to {end} in a vocabulary of {self.vocab_size}"
        if not 0 <= self.end_id < self.vocab_size:
            yield f"end_id is {self.end_id} in a vocabulary of {self.vocab_size}"
        if begin <= self.end_id <= end:
            yield f"end_id {self.end_id} is one of the semantic ids"
        if self.main_tokens == "any" and self.head != "full":
            yield "main_tokens is 'any', but the head has only the logits of audio tokens"
        if self.code_offset not in ((0, 1) if self.code_zero == "fast" else (0,)):
            yield f"code_offset is {self.code_offset} where code 0 comes from {self.code_zero}; known are 0, and 1 with fast"
        if self.fast_candidates <= self.code_offset:
            yield f"fast_candidates is {self.fast_candidates}, which leaves nothing above code_offset {self.code_offset}"
        if self.fast_candidates > self.codebook_width:
            yield f"fast_candidates is {self.fast_candidates}, above codebook_width {self.codebook_width}"
        if self.max_prompt >= max(self.max_seq_len, 2):
            yield f"max_prompt is {self.max_prompt}, which leaves no room in max_seq_len {self.max_seq_len}"
        ranges = self.cleaning and (*(self.cleaning.keep or ()), *self.cleaning.drop)
        if wrong := [list(r) for r in ranges or () if len(r) != 2 or not 0 <= r[0] <= r[1]]:
            yield f"cleaning holds {wrong[0]}, which is no first and last code point"
        if len(self.voice_seconds) != 2 or not 0 < self.voice_seconds[0] <= self.voice_seconds[1]:
            yield f"voice_seconds is {list(self.voice_seconds)}, which is no least and most length"
        if self.cleaning and ("" in self.cleaning.replace or self.cleaning.keep == ()):
            yield "cleaning replaces nothing by something, or keeps nothing"


@dataclass(frozen=True, slots=True)
class DecodeContext:
    """Frames around a frame that its samples depend on: decoded with them, a frame has the samples of a whole decode."""

    left: int
    ahead: int


@dataclass(frozen=True, slots=True)
class Codec:
    """Waveform ↔ codes, or ↔ latents."""

    sample_rate: int
    """Hz."""
    hop: int
    """Samples per frame."""
    codebook_sizes: tuple[int, ...]
    """Empty: the codec has latents."""
    max_frames: int
    """Longest sequence that the graphs take, in frames."""
    min_samples: int
    """Shortest waveform that can be encoded."""
    sample_multiple: int
    """Before encoding, silence pads a waveform to a multiple of this many samples."""
    context: DecodeContext | None
    """None: a frame depends on every earlier one."""
    fingerprint: str
    """SHA-256 over the codec's weights and sizes; voices of another codec raise an error."""
    channels: int | None = None
    """Numbers of one latent frame. None: the codec has codes."""

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.hop

    def faults(self) -> Iterator[str]:
        """Yield a message for each value that is out of range."""
        counts = {
            "sample_rate": self.sample_rate,
            "hop": self.hop,
            "max_frames": self.max_frames,
            "min_samples": self.min_samples,
            "sample_multiple": self.sample_multiple,
            **({} if self.channels is None else {"channels": self.channels}),
            **{f"codebook_sizes[{n}]": size for n, size in enumerate(self.codebook_sizes)},
        }
        yield from (f"{name} is {count}, below 1" for name, count in counts.items() if count < 1)
        if bool(self.codebook_sizes) == (self.channels is not None):
            yield f"channels is {self.channels} with {len(self.codebook_sizes)} codebook_sizes; a codec has latents or codes"
        if self.context and min(self.context.left, self.context.ahead) < 0:
            yield f"context is {self.context.left} and {self.context.ahead} frames, below 0"
        if self.context and self.context.left + self.context.ahead >= self.max_frames:
            yield f"context is {self.context.left} and {self.context.ahead} frames, but the graphs take {self.max_frames}"


def sampling_faults(temperature: object, top_p: object, top_k: object, repetition_penalty: object) -> Iterator[tuple[str, str]]:
    """Yield a pair for each setting that is out of range: the value found, and the rule. The last two may be None."""
    if not isinstance(temperature, Real) or not 0 <= float(temperature) < 2:
        yield f"temperature is {temperature}", "it must be at least 0 and below 2"
    if not isinstance(top_p, Real) or not 0 < float(top_p) <= 1:
        yield f"top_p is {top_p}", "it must be above 0 and at most 1"
    if top_k is not None and (not isinstance(top_k, Integral) or top_k < 1):
        yield f"top_k is {top_k}", "it must be a whole number of at least 1"
    if repetition_penalty is not None and (not isinstance(repetition_penalty, Real) or not 0 < float(repetition_penalty) <= 2):
        yield f"repetition_penalty is {repetition_penalty}", "it must be above 0 and at most 2"
