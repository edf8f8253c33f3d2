"""The fields that set the sampler of a diffusion model, in the words of the original's streaming server → `Denoising`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ...bundle.diffusion import Diffusion
from ...diffusion.denoising import PRESETS, Denoising, preset
from ...diffusion.text import Pace
from ..problems import Problem
from ..words import expected

MOST_STEPS = 100
"""Most steps of a block: the model has a table of all steps, of about a megabyte each."""
_LARGEST = 100.0
"""Largest factor: far larger ones give latents that are no numbers."""
_LONGEST_PIECE_S = 1e9
"""The seconds of a piece of a text that is not cut by its length in time."""

_SETTINGS = {
    "block_sizes": "blocks",
    "num_steps": "steps",
    "cfg_scale_text": "cfg_text",
    "cfg_scale_speaker": "cfg_speaker",
    "cfg_min_t": "cfg_min_t",
    "cfg_max_t": "cfg_max_t",
    "truncation_factor": "truncation",
    "init_scale": "init_scale",
    "rescale_k": "rescale_k",
    "rescale_sigma": "rescale_sigma",
    "speaker_kv_scale": "force_speaker",
    "speaker_kv_min_t": "force_min_t",
    "speaker_kv_max_layers": "force_layers",
    "early_stop_on_zero": "early_stop",
    "zero_eps": "zero_eps",
    "zero_tail_frames": "zero_tail_frames",
}
"""Fields of requests, with those of `Denoising` that they set."""
_PACE = {
    "chunk_target_seconds": "target_s",
    "chunk_min_seconds": "min_s",
    "chunk_max_seconds": "max_s",
    "chunk_chars_per_second": "letters_per_s",
    "chunk_words_per_second": "words_per_s",
}
PER_BLOCK = ("num_steps", "truncation_factor", "init_scale")
"""Fields that may have a value for each block."""
DIFFUSION = frozenset(_SETTINGS) - {"early_stop_on_zero", "zero_eps", "zero_tail_frames"} | {"guidance_mode"}
"""Fields that set what is heard: a language model refuses them."""
LANGUAGE = frozenset(("temperature", "temp", "top_p", "top_k", "repetition_penalty", "speaker_prompt"))
"""Fields of speech that set what is heard of a language model: a diffusion model refuses them."""


def number(value: Any) -> Any:
    """Return a number, or a list of them, that some clients send as text."""
    if isinstance(value, list):
        return [number(each) for each in value]
    for kind in (int, float) if isinstance(value, str) else ():
        try:
            return kind(value)
        except ValueError:
            pass
    if isinstance(value, str):
        raise ValueError("a number is expected")
    return value


def _flag(value: Any) -> Any:
    """Return a truth value that some clients send as text or as a number."""
    text = str(value).strip().lower()
    if text in ("0", "false", "no", "off", ""):
        return False
    return True if text in ("1", "true", "yes", "on") else value


def _list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


_T = TypeVar("_T")
_Several = Annotated[list[_T], Field(min_length=1)]
_Whole = Annotated[int, Field(ge=1)]
_Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
_Above0 = Annotated[float, Field(gt=0, le=_LARGEST)]
_Weight = Annotated[float, Field(ge=-_LARGEST, le=_LARGEST)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Scale = Annotated[float, Field(gt=0, le=1)]
_Text = BeforeValidator(number)
_Truth = BeforeValidator(_flag)


class DenoisingFields(BaseModel):
    """What requests to a diffusion model take beside the fields of speech. Every field may be left out or null."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    preset: str | None = Field(None, description=f"Settings by name, which the other fields change: {', '.join(PRESETS)}.")
    block_sizes: Annotated[_Several[_Whole] | None, BeforeValidator(_list), _Text] = Field(
        None, description="Frames of each block: a stream speaks one while the next is made. One number: one block."
    )
    num_steps: Annotated[_Steps | _Several[_Steps] | None, _Text] = Field(None, description="Steps, of all blocks or of each.")
    cfg_scale_text: Annotated[_Weight | None, _Text] = Field(None, description="Weight of the guidance by text.")
    cfg_scale_speaker: Annotated[_Weight | None, _Text] = Field(None, description="Weight of the guidance by voice.")
    cfg_min_t: Annotated[float | None, _Text] = Field(None, description="Least time of a step with guidance.")
    cfg_max_t: Annotated[float | None, _Text] = Field(None, description="Largest time of a step with guidance.")
    truncation_factor: Annotated[_Above0 | _Several[_Above0] | None, _Text] = Field(
        None, description="Factor on the noise, of all blocks or of each."
    )
    init_scale: Annotated[_Scale | _Several[_Scale] | None, _Text] = Field(
        None, description="Time of the first step, of all blocks or of each."
    )
    rescale_k: Annotated[_Above0 | None, _Text] = Field(None, description="Temporal rescaling of scores, with rescale_sigma.")
    rescale_sigma: Annotated[_Above0 | None, _Text] = Field(None, description="Temporal rescaling of scores, with rescale_k.")
    speaker_kv_scale: Annotated[_Above0 | None, _Text] = Field(None, description="Brings a voice nearer; such as 1.3.")
    speaker_kv_min_t: Annotated[_Share | None, _Text] = Field(None, description="Time below which speaker_kv_scale ends.")
    speaker_kv_max_layers: Annotated[_Whole | None, _Text] = Field(None, description="Layers that speaker_kv_scale changes.")
    early_stop_on_zero: Annotated[bool | None, _Truth] = Field(None, description="End after a block that ends in silence.")
    zero_eps: Annotated[float | None, _Text] = Field(None, ge=0, description="Largest value of silence.")
    zero_tail_frames: Annotated[_Whole | None, _Text] = Field(None, description="Frames of silence at the end of a block.")
    guidance_mode: Literal["independent"] | None = Field(None, description="independent: the one mode that there is.")
    chunking_enabled: Annotated[bool | None, _Truth] = Field(
        None, description="false: a text is cut only where its bytes are too many for the model."
    )
    chunk_target_seconds: Annotated[float | None, _Text] = Field(None, ge=0, description="Usual length of a piece of the text.")
    chunk_min_seconds: Annotated[float | None, _Text] = Field(None, ge=0, description="Least length of a piece.")
    chunk_max_seconds: Annotated[float | None, _Text] = Field(None, ge=0, description="Largest length of a piece.")
    chunk_chars_per_second: Annotated[float | None, _Text] = Field(None, ge=0, description="Pace by which lengths are estimated.")
    chunk_words_per_second: Annotated[float | None, _Text] = Field(None, ge=0, description="Pace by which lengths are estimated.")


KEYS = frozenset(DenoisingFields.model_fields)
"""All fields that change something."""


def denoising_of(
    found: Mapping[str, Any], model: Diffusion, base: Denoising | None, frames: int | None
) -> tuple[Denoising, list[str]]:
    """Return the settings among the fields of a request, and the fields that change nothing. Raises Problem, SamplingError.

    base: settings behind those of the request, and behind those of its preset. frames: the limit of a piece. What none of them
    sets is None.
    """
    try:
        fields = DenoisingFields.model_validate(found)
    except ValidationError as error:
        faults = error.errors()
        first = next((each for each in faults if each["type"] == "too_short" or isinstance(each["loc"][-1], int)), faults[0])
        name = str(first["loc"][0])
        raise Problem(400, f"{name}: {expected(first)}", param=name) from None
    given = {name: value for name in KEYS if (value := getattr(fields, name)) is not None}
    ignored = []
    if "speaker_kv_scale" not in given:
        ignored = [name for name in ("speaker_kv_min_t", "speaker_kv_max_layers") if given.pop(name, None) is not None]
    pace = {own: given[name] for name, own in _PACE.items() if name in given}
    if given.get("chunking_enabled") is False:
        ignored += [name for name in _PACE if name in given]
        pace = dict.fromkeys(("target_s", "min_s", "max_s"), _LONGEST_PIECE_S)
    for name in PER_BLOCK:
        _check_length(name, given.get(name), given.get("block_sizes"))
    own = {setting: given[name] for name, setting in _SETTINGS.items() if name in given}
    settings = Denoising(**own, frames=frames, pace=Pace(**pace) if pace else None)
    for usual in filter(None, (None if fields.preset is None else preset(fields.preset), base)):
        cut = frames if settings.blocks is None and usual.blocks is not None else None
        settings = _over(settings, usual if cut is None else usual.first(cut))
    settings.resolve(model)
    return settings, ignored


def asked(settings: Denoising) -> dict[str, Any]:
    """Return settings as a request would ask for them; null is off."""
    return {name: getattr(settings, setting) for name, setting in _SETTINGS.items()}


def _over(settings: Denoising, base: Denoising) -> Denoising:
    """Return `settings.over(base)`. Raises Problem for a list that has not a value for each block."""
    for name in PER_BLOCK:
        own, usual = (getattr(each, _SETTINGS[name]) for each in (settings, base))
        _check_length(name, usual if own is None else own, settings.blocks or base.blocks)
    return settings.over(base)


def _check_length(name: str, value: object, blocks: Sequence[int] | None) -> None:
    """Check that a list has a value for each block, if both are known. Raises Problem."""
    if blocks and isinstance(value, Sequence) and len(value) != len(blocks):
        what = f"{name}: {len(value)} values are given, but block_sizes has {len(blocks)}"
        raise Problem(400, f"{what}; give one value, or one for each block", param=name)
