"""A voice to measure with, and a prompt in it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..arrays import Ints
from ..bundle.folder import Bundle, Manifest
from ..language_model.prompt import PromptBuilder
from ..text.tokenizer import Tokenizer
from ..voices.store import VoiceStore
from ..voices.voice import Voice

SECONDS = 10.0
"""Seconds of speech in a made-up voice: the least that is recommended for the official models."""
TRANSCRIPT = "This is a recording of somebody who speaks for about ten seconds, and these are the words that are said in it."
_SHARE = 4
"""A made-up voice takes at most 1 / _SHARE of the longest prompt."""


def bench_prompt(bundle: Bundle, text: str) -> Ints:
    """Return the prompt for the first piece of a text in `bench_voice`: int64 [1 + C, length]. Raises PromptError."""
    manifest, voice = bundle.manifest, bench_voice(bundle)
    lm = manifest.language_model
    prompts = PromptBuilder(Tokenizer.load(bundle.file(manifest.tokenizer)), lm)
    heard = replace(voice, codes=voice.codes[: lm.num_codebooks])  # the codec may have more codebooks than the model
    return prompts.start([heard], None).user(prompts.split(text)[0])


def bench_voice(bundle: Bundle) -> Voice:
    """Return the bundle's default voice, or a made-up one if it has none."""
    manifest = bundle.manifest
    if manifest.voices is None:
        return made_up_voice(manifest, 0)
    return VoiceStore(bundle.path / "voices").load(manifest.voices.default)


def made_up_voice(manifest: Manifest, seed: int) -> Voice:
    """Return a voice of random codes. Voices of different seeds begin differently."""
    codec, lm = manifest.codec, manifest.language_model
    frames = max(1, min(round(SECONDS * codec.frame_rate), lm.max_prompt // _SHARE))
    # Codes that both the codec and the model's tables have.
    sizes = [min(size, lm.codebook_width - lm.code_offset) for size in codec.codebook_sizes]
    if lm.code_zero == "main":
        sizes[0] = min(sizes[0], lm.semantic_end_id - lm.semantic_begin_id + 1)
    rng = np.random.default_rng(seed)
    codes = np.stack([rng.integers(0, size, frames) for size in sizes])
    return Voice(f"bench-{seed}", codes, TRANSCRIPT, codec.fingerprint)
