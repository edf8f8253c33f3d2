"""One piece of text, from tokens to latents, over the graphs of a bundle.

    tokens ──text_cond───► keys, values ─┐                                     ┌────────────── next step ──────────────┐
    voice ───speaker_cond► keys, values ─┼─► denoise: velocities of all rows ──┴► Euler step ─► block of latents ──────┴─► ending
    latents before ─latent_cond► k., v. ─┘        ▲                                                    │
       ▲                                      schedule: a table for all times                          │
       └───────────────────────────────────────────────────────────────────────────────────────────────┘

All but the velocities is computed once: for a voice, a text, a block or a schedule. Keys and values are arrays that never change
and own their memory, so that a CPU reads them where they are and a device copies them once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fishrt_engines import Array, Engine

from ..arrays import Floats, Ints
from ..bundle.diffusion import Diffusion
from ..errors import PromptError, SamplingError
from .denoising import Denoising, per_block
from .ending import Ending
from .sampler import Block, Noise, Row, SeededNoise, times

StopReason = Literal["end", "pause", "max_frames"]
"""Reasons of an end: silence; a pause that was taken for it, after which there is more; the end of the window."""
_TABLE_BYTES = 128_000_000
"""Most bytes of tables that are kept; the newest stays in any case. A step of the official model takes 1.2 MB."""
TABLE_STEPS = 100
"""Most steps of a table, so that any number of steps takes bounded memory."""
_NO_TOKEN = np.zeros((1, 1), np.int64)
"""A text without words: the token before every text."""


@dataclass(frozen=True, slots=True)
class KeysValues:
    """Keys and values of a text, a voice, or latents: float32 [1, layers, heads, positions, head_dim]."""

    keys: Floats
    values: Floats

    @property
    def positions(self) -> int:
        """Number of positions."""
        return int(self.keys.shape[3])

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.keys.nbytes + self.values.nbytes

    @classmethod
    def of(cls, keys: Floats, values: Floats) -> KeysValues:
        """Return constant copies of keys and values."""
        return cls(_constant(keys), _constant(values))

    def then(self, other: KeysValues) -> KeysValues:
        """Return these positions with those of `other` behind them."""
        keys, values = (np.concatenate(pair, axis=3) for pair in ((self.keys, other.keys), (self.values, other.values)))
        return KeysValues.of(keys, values)

    def named(self, of: str) -> dict[str, Array]:
        """Return them as feeds."""
        return {f"{of}_keys": self.keys, f"{of}_values": self.values}


class Denoiser:
    """The graphs of a diffusion model, and what is computed once for all texts. Several threads may use it."""

    def __init__(self, engines: Mapping[str, Engine], model: Diffusion) -> None:
        """engines: by role; each is opened when it is first accessed."""
        self.engines, self.model = engines, model
        self._tables: OrderedDict[tuple[int, float, int], Floats] = OrderedDict()
        self._wordless: KeysValues | None = None
        self._making = threading.Lock()

    def voice(self, latents: Floats) -> KeysValues:
        """Return the keys and values of a voice, latents float32 [frames, channels], at least one whole patch."""
        return self._conditioned("speaker", {"latents": latents[None]})

    def text(self, tokens: Ints) -> KeysValues:
        """Return the keys and values of a text, int64 [tokens]."""
        return self._conditioned("text", {"tokens": tokens[None], "mask": np.ones((1, len(tokens)), bool)})

    def before(self, latents: Floats) -> KeysValues:
        """Return the keys and values of the latents before a block, float32 [frames, channels], frames ≥ 1.

        The frames that the last patch lacks are zeros, as in the original.
        """
        missing = -len(latents) % self.model.patch
        return self._conditioned("latent", {"latents": np.pad(latents, ((0, missing), (0, 0)))[None]})

    def nothing(self) -> KeysValues:
        """Return one position of zeros, which is masked: engines take no empty arrays."""
        model = self.model
        zeros = _constant(np.zeros((1, model.layers, model.heads, 1, model.head_dim), np.float32))
        return KeysValues(zeros, zeros)

    def wordless(self) -> KeysValues:
        """Return the keys and values of a text without words."""
        with self._making:
            if self._wordless is None:
                self._wordless = self.text(_NO_TOKEN[0])
            return self._wordless

    def modulation(self, steps: int, init_scale: float, step: int) -> Floats:
        """Return what depends on the time alone, of one of the steps: float32 [1, layers, 6, width].

        It is a row of a table, of which the last ones are kept.
        """
        part, row = divmod(step, TABLE_STEPS)
        return self._table(steps, init_scale, part)[row : row + 1]

    def _table(self, steps: int, init_scale: float, part: int) -> Floats:
        key = (steps, init_scale, part)
        with self._making:
            if key not in self._tables:
                t = times(steps, init_scale)[:-1]
                found = self.engines["schedule"].run({"t": t[part * TABLE_STEPS : (part + 1) * TABLE_STEPS]})
                self._tables[key] = _constant(found["modulation"])
                while len(self._tables) > 1 and sum(table.nbytes for table in self._tables.values()) > _TABLE_BYTES:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(key)
            return self._tables[key]

    def _conditioned(self, of: str, feeds: Mapping[str, Array]) -> KeysValues:
        found = self.engines[f"{of}_cond"].run(feeds)
        return KeysValues.of(found[f"{of}_keys"], found[f"{of}_values"])


def _constant(array: Floats) -> Floats:
    """Return a copy that owns its memory, in which no call may write."""
    constant = np.array(array, np.float32, order="C")
    constant.flags.writeable = False
    return constant


class Utterance:
    """One piece of text: the steps of its blocks, one after the other, and the speech that they make."""

    def __init__(
        self,
        denoiser: Denoiser,
        tokens: Ints,
        voice: KeysValues | None,
        denoising: Denoising,
        noise: Noise | int,
        *,
        before: Floats | None = None,
    ) -> None:
        """Make an utterance that has not begun: no graph runs.

        tokens: int64 [tokens]. voice: None lets the model choose one. denoising: resolved. noise: or a seed.
        before: latents of speech that the text begins with and that is continued, float32 [frames, channels].
        Raises PromptError for a text that is too long, SamplingError for a window that is, with what is before it.
        """
        model = denoiser.model
        if len(tokens) > model.max_tokens:
            raise PromptError(
                f"a piece of text has {len(tokens)} tokens; the model takes {model.max_tokens}", hint="split it into shorter ones"
            )
        self._before = np.zeros((0, model.channels), np.float32) if before is None else before
        assert denoising.blocks is not None
        start, total = len(self._before), sum(denoising.blocks)
        if start and not model.blockwise:
            raise SamplingError("speech cannot be continued", hint="the checkpoint of this bundle has no weights for blocks")
        if start + total > model.max_frames:
            raise SamplingError(
                f"{total} frames are wanted after {start} others; the model takes {model.max_frames} in all",
                hint="continue a shorter part, or set fewer frames",
            )
        assert denoising.steps is not None
        assert denoising.truncation is not None
        assert denoising.init_scale is not None
        self._denoiser, self._tokens, self._voice, self._settings = denoiser, tokens, voice, denoising
        self._noise: Noise = SeededNoise(noise) if isinstance(noise, int) else noise
        self._blocks, count = denoising.blocks, len(denoising.blocks)
        self._steps = per_block(denoising.steps, count)
        self._truncations, self._init_scales = per_block(denoising.truncation, count), per_block(denoising.init_scale, count)
        self._ending = Ending(denoising)
        self.steps = sum(self._steps)
        """Euler steps of all blocks."""
        self.step = 0
        """Steps that were taken."""
        self.stop_reason: StopReason | None = None
        """None: it goes on."""
        self._number, self._voice_factor = 0, 1.0
        self._block: Block | None = None
        self._of_text: dict[str, Array] = {}
        self._of_block: dict[str, Array] = {}
        self._masks: dict[tuple[Row, ...], dict[str, Array]] = {}

    @property
    def frames(self) -> int:
        """Frames that were given out."""
        return self._ending.given

    @property
    def latents(self) -> Floats:
        """Those of all blocks so far, float32 [frames, channels], behind the ones that are continued and with all silence."""
        return self._before

    @property
    def nbytes(self) -> int:
        """Bytes of what it has read: keys and values of text, voice, and the latents before its block."""
        return sum(array.nbytes for array in (*self._of_text.values(), *self._of_block.values()))

    def advance(self) -> Floats | None:
        """Take one Euler step; the first of the text and of a block also computes what all steps share.

        Return None within a block; after its last step latents float32 [frames, channels], maybe none, which are spoken next. The
        quiet frames at the end of a block wait for the next, since they may be the end of the speech.
        Raises GraphError for velocities that are not numbers.
        """
        if not self._of_text:
            self._of_text = self._read_text()
        block = self._block = self._block or self._begin_block()
        feeds = {
            **self._of_text,
            **self._of_block,
            **self._masks_of(block.rows),
            "latents": block.latents[None],
            "modulation": self._denoiser.modulation(*self._schedule, block.step),
            "speaker_scale": self._scale(block.voice_factor),
        }
        block.accept(self._denoiser.engines["denoise"].run(feeds)["velocity"][0])
        self.step += 1
        return self._end_block(block) if block.done else None

    def _read_text(self) -> dict[str, Array]:
        """Return the feeds of the text and the voice."""
        denoiser, text = self._denoiser, self._denoiser.text(self._tokens)
        if self._settings.variant == "streaming":
            text = text.then(denoiser.wordless())
        return {**text.named("text"), **(self._voice or denoiser.nothing()).named("speaker")}

    def _masks_of(self, rows: tuple[Row, ...]) -> dict[str, Array]:
        """Return what each row sees of the text and the voice.

        Without text that is nothing; in the streaming variant the text without words, one position behind the text.
        """
        if rows not in self._masks:
            words = np.arange(self._of_text["text_keys"].shape[3]) < len(self._tokens)
            voice = np.full(self._of_text["speaker_keys"].shape[3], self._voice is not None)
            text_rows = [~words if row == "no_text" else words for row in rows]
            voice_rows = [voice & (row != "no_voice") for row in rows]
            self._masks[rows] = {"text_mask": np.stack(text_rows)[None], "speaker_mask": np.stack(voice_rows)[None]}
        return self._masks[rows]

    def _begin_block(self) -> Block:
        denoiser, model, number = self._denoiser, self._denoiser.model, self._number
        steps, init_scale, frames, start = self._steps[number], self._init_scales[number], self._blocks[number], len(self._before)
        self._schedule = (steps, init_scale)
        self._of_block = {"position_ids": np.arange(start, start + frames, dtype=np.int64)[None]}
        if model.blockwise:
            before = denoiser.before(self._before) if start else denoiser.nothing()
            self._of_block |= {**before.named("latent"), "latent_mask": np.full((1, before.positions), start > 0)}
        noise, at = self._noise.draw(frames, model.channels), times(steps, init_scale)
        voiced, truncation = self._voice is not None, self._truncations[number]
        return Block(noise, at, self._settings, truncation, voiced=voiced, factor=self._voice_factor)

    def _end_block(self, block: Block) -> Floats:
        self._block, self._voice_factor, self._number = None, block.voice_factor, self._number + 1
        self._before = np.concatenate([self._before, block.latents])
        given = self._ending.push(block.latents, last=self._number == len(self._blocks))
        if self._ending.stopped:
            ends: StopReason = "pause" if self._ending.resumes else "end"
            self.stop_reason = "max_frames" if self._ending.end == sum(self._blocks) else ends
        return given

    def _scale(self, factor: float) -> Floats:
        """Return the factor on the voice's keys and values in each layer, float32 [1, layers]."""
        layers = np.arange(self._denoiser.model.layers)
        forced = layers < (self._settings.force_layers or 0)
        return np.where(forced, factor, 1.0).astype(np.float32)[None]
