"""Settings of a generation: steps, guidance, blocks, and when it ends. Presets of the original programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite
from numbers import Integral, Real
from typing import Any, TypeGuard, TypeVar, get_args

from ..bundle.diffusion import Diffusion, contradictions, denoising_faults
from ..errors import SamplingError
from .text import Pace, Variant

T = TypeVar("T", int, float)
_PER_BLOCK = ("steps", "truncation", "init_scale")
_WHOLE = ("frames", "force_layers", "zero_tail_frames")
_SHARES = ("init_scale", "force_min_t")


@dataclass(frozen=True, slots=True)
class Denoising:
    """How latents are made of noise; None means the bundle's default. Raises SamplingError for a value outside its range.

    Time runs from 1, noise, to 0, speech. `steps`, `truncation` and `init_scale` may be lists with a value for each block.

    Attributes:
        steps: at least 1. Euler steps; fewer are faster and coarser.
        cfg_text: weight of the guidance by text: of the difference from the velocity without text. 0: none.
        cfg_speaker: weight of the guidance by voice. 0: none.
        cfg_min_t: least time of a step with guidance, which costs three times as much as one without.
        cfg_max_t: largest time of a step with guidance.
        truncation: above 0. Factor on the noise; below 1 speech is flatter and has fewer faults.
        init_scale: above 0, at most 1. Time of the first step; 0.999 by default.
        rescale_k: above 0. Strength of the temporal rescaling of scores, with rescale_sigma. 1 changes nothing.
        rescale_sigma: above 0. Width of the temporal rescaling of scores.
        force_speaker: above 0. Factor on the voice's keys and values; 1.1 to 1.5 brings a voice nearer that is imitated badly.
        force_min_t: 0 to 1; 0.9 by default. Time below which force_speaker ends. It begins anew in every block, on top of
            what is left of the block before: with 0, it is never taken back, and grows with each block.
        force_layers: at least 1. Layers from the first on that force_speaker changes; all by default.
        blocks: frames of each block of the window, for models that generate in blocks. A stream speaks a block while the next
            is made: by default it has the blocks of the preset "default", with their steps. Otherwise the window is one block.
        frames: frames of the window of a piece of text; by default those of the blocks, or else as many as the model takes.
            Speech that does not fit is cut off.
        early_stop: whether no more blocks are made once one ends in silence; yes by default.
        zero_eps: at least 0; 0.012 by default. Largest value of silence at the end of a block.
        zero_tail_frames: at least 1; 32 by default. Frames of silence at the end of a block after which no more are made.
        variant: "official", by default, or "streaming": the text rules, the guidance by text, and the search for the end of
            speech are those of the original's streaming server.
        pace: lengths of the pieces of a long text.
        later: settings of all pieces of a long text but the first; by default those of the first.
    """

    steps: int | Sequence[int] | None = None
    cfg_text: float | None = None
    cfg_speaker: float | None = None
    cfg_min_t: float | None = None
    cfg_max_t: float | None = None
    truncation: float | Sequence[float] | None = None
    init_scale: float | Sequence[float] | None = None
    rescale_k: float | None = None
    rescale_sigma: float | None = None
    force_speaker: float | None = None
    force_min_t: float | None = None
    force_layers: int | None = None
    blocks: Sequence[int] | None = None
    frames: int | None = None
    early_stop: bool | None = None
    zero_eps: float | None = None
    zero_tail_frames: int | None = None
    variant: Variant | None = None
    pace: Pace | None = None
    later: Denoising | None = None

    def __post_init__(self) -> None:
        for name in (*_PER_BLOCK, "blocks"):
            if isinstance(value := getattr(self, name), Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        for found, rule in self._faults():
            raise SamplingError(found, hint=rule)

    def _faults(self) -> Iterator[tuple[str, str]]:
        """Yield a pair for each field that is out of range by itself, and for lists that are not as long as the blocks."""
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if name in _PER_BLOCK and isinstance(value, tuple):
                for item in value:
                    yield from _field_faults(name, item)
                if not value or (self.blocks is not None and len(value) != len(self.blocks)):
                    yield _wrong_length(name, len(value), None if self.blocks is None else len(self.blocks))
            elif value is not None:
                yield from _field_faults(name, value)

    def over(self, base: Denoising) -> Denoising:
        """Return these settings with those of `base` for the ones that are None."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return Denoising(**{name: getattr(base, name) if value is None else value for name, value in own.items()})

    def streamed(self, model: Diffusion) -> Denoising:
        """Return these settings with the blocks of a stream, and their steps, if they say nothing of blocks.

        A list with a value for each block does: it is not for these. A model without blocks has none.
        """
        lists = any(isinstance(getattr(self, name), tuple) for name in _PER_BLOCK)
        if self.blocks is not None or lists or not model.blockwise:
            return self
        usual, frames = PRESETS["default"], self.frames or model.max_frames
        assert usual.blocks is not None
        return self.over(Denoising(usual.steps, blocks=(*usual.blocks[:-1], max(usual.blocks[-1], frames))).first(frames))

    def resolve(self, model: Diffusion) -> Denoising:
        """Return these settings with a bundle's defaults for those that are None.

        None is left where it means that something is not done: rescaling, force_speaker; and for the pace and later pieces.
        Raises SamplingError for settings that contradict each other, and for frames and blocks that the model does not take.
        """
        usual = Denoising(
            **asdict(model.denoising),
            init_scale=0.999,
            force_min_t=None if self.force_speaker is None else 0.9,
            force_layers=None if self.force_speaker is None else model.layers,
            blocks=self.blocks or (model.max_frames if self.frames is None else self.frames,),
            early_stop=True,
            zero_eps=0.012,
            zero_tail_frames=32,
            variant="official",
        )
        whole = self.over(usual)
        later = None if self.later is None else self.later.resolve(model)
        whole = replace(whole.over(Denoising(truncation=1.0, frames=sum(whole.blocks or ()))), later=later)
        for found, rule in (*contradictions(asdict(whole)), *whole._misfits(model)):
            raise SamplingError(found, hint=rule)
        return whole

    def first(self, frames: int) -> Denoising:
        """Return settings with blocks for at most so many frames: the last blocks are shorter, or left out."""
        assert self.blocks is not None
        left, blocks = frames, list[int]()
        for block in self.blocks:
            if left > 0:
                blocks.append(min(block, left))
                left -= block
        per_block: tuple[Any, ...] = (self.steps, self.truncation, self.init_scale)
        steps, truncation, init_scale = (value[: len(blocks)] if isinstance(value, tuple) else value for value in per_block)
        later = None if self.later is None else self.later.first(frames)
        return replace(
            self, steps=steps, truncation=truncation, init_scale=init_scale, blocks=blocks, frames=sum(blocks), later=later
        )

    def _misfits(self, model: Diffusion) -> Iterator[tuple[str, str]]:
        """Yield a pair for each resolved setting that does not fit the others or the model."""
        assert self.blocks is not None
        if self.force_speaker is None and (self.force_min_t is not None or self.force_layers is not None):
            yield "force_min_t or force_layers is given without force_speaker", "give force_speaker, such as 1.3"
        total = sum(self.blocks)
        if self.frames != total:
            yield f"the blocks {list(self.blocks)} are {total} frames, but frames is {self.frames}", "leave one of them out"
        if total > model.max_frames:
            yield (
                f"{total} frames are wanted",
                f"the model makes at most {model.max_frames} at once; a longer text has several pieces",
            )
        if len(self.blocks) > 1 and not model.blockwise:
            yield (
                f"{len(self.blocks)} blocks are wanted",
                "the checkpoint of this bundle has no weights for blocks: leave them out",
            )


def _field_faults(name: str, value: object) -> Iterator[tuple[str, str]]:
    """Yield a pair for a value of a field, or of one block, that is out of range."""
    yield from denoising_faults({name: value})
    if name in _WHOLE and not _is_count(value):
        yield f"{name} is {value!r}", "it must be a whole number of at least 1"
    if name == "blocks" and not (isinstance(value, tuple) and value and all(map(_is_count, value))):
        yield f"blocks is {value!r}", "it must be a list of whole numbers of at least 1, such as 32, 128, 480"
    if name in _SHARES and not (_is_number(value) and 0 <= value <= 1 and (value or name != "init_scale")):
        yield f"{name} is {value!r}", f"it must be {'above 0 and' if name == 'init_scale' else 'at least 0,'} at most 1"
    if name == "force_speaker" and not (_is_number(value) and value > 0):
        yield f"{name} is {value!r}", "it must be a finite number above 0"
    if name == "zero_eps" and not (_is_number(value) and value >= 0):
        yield f"{name} is {value!r}", "it must be a finite number of at least 0"
    if name == "early_stop" and not isinstance(value, bool):
        yield f"{name} is {value!r}", "it must be True or False"
    if name == "variant" and value not in get_args(Variant):
        yield f"{name} is {value!r}", f"it must be one of {', '.join(get_args(Variant))}"
    if name == "pace" and not isinstance(value, Pace):
        yield f"{name} is {value!r}", "it must be a Pace"
    if name == "later" and not isinstance(value, Denoising):
        yield f"{name} is {value!r}", "it must be a Denoising"


def _wrong_length(name: str, found: int, blocks: int | None) -> tuple[str, str]:
    of = "" if blocks is None else f" for {blocks} block{'s' if blocks > 1 else ''}"
    return f"{name} has {found} value{'' if found == 1 else 's'}{of}", "give one value, or one for each block"


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)


def per_block(value: T | Sequence[T], blocks: int) -> tuple[T, ...]:
    """Return the value of each block."""
    return tuple(value) if isinstance(value, Sequence) else (value,) * blocks


def _of_interface(cfg_text: float, cfg_speaker: float, *, flat: bool) -> Denoising:
    truncation, k = (0.8, 1.2) if flat else (1.0, 1.0)
    return Denoising(40, cfg_text, cfg_speaker, 0.5, 1.0, truncation, rescale_k=k, rescale_sigma=3.0)


PRESETS: Mapping[str, Denoising] = {
    "independent_high_speaker_cfg": _of_interface(3.0, 8.0, flat=False),
    "independent_high_speaker_cfg_flat": _of_interface(3.0, 8.0, flat=True),
    "independent_high_cfg": _of_interface(8.0, 8.0, flat=False),
    "independent_high_cfg_flat": _of_interface(8.0, 8.0, flat=True),
    "independent_low_cfg": _of_interface(3.0, 3.0, flat=False),
    "independent_low_cfg_flat": _of_interface(3.0, 3.0, flat=True),
    "default": Denoising((8, 15, 20), blocks=(32, 128, 480)),
    "low_mid": Denoising((8, 10, 15), blocks=(32, 128, 480)),
    "low": Denoising((8, 10, 15, 15), blocks=(32, 64, 272, 272)),
    "equal": Denoising((15, 15, 15), blocks=(213, 213, 214)),
}
"""Settings of the original's page, for a whole window, and of the streaming server, in blocks."""


def preset(name: str) -> Denoising:
    """Return the preset of a name, in which case and "-" do not count. Raises SamplingError for an unknown name."""
    found = PRESETS.get(name.strip().lower().replace("-", "_"))
    if found is None:
        raise SamplingError(f"there is no preset {name!r}", hint=f"the presets are {', '.join(PRESETS)}")
    return found
