"""A codec of latents: what it takes, and sound while latents come."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_diffusion import CODEC, latent_engines
from fishrt.codec import CodecDecoder, CodecEncoder
from fishrt.errors import AudioError, VoiceError

ENGINES = latent_engines()
LATENTS = np.random.default_rng(0).standard_normal((50, 8), np.float32)


def test_a_recording_gives_frames_of_latents() -> None:
    latents = CodecEncoder(ENGINES["codec_encode"], CODEC).encode(np.full(125, 0.5, np.float32))
    assert (latents.dtype, latents.shape) == (np.float32, (2, 8))
    np.testing.assert_allclose(latents, [[0.5] * 8, [0.125] * 8])
    with pytest.raises(AudioError, match="at most"):
        CodecEncoder(ENGINES["codec_encode"], CODEC).encode(np.zeros(701 * 100, np.float32))


@given(st.lists(st.integers(1, 50), max_size=6), st.booleans())
def test_latents_in_parts_give_the_sound_of_all_at_once(cuts: list[int], flushed: bool) -> None:
    decoder = CodecDecoder(ENGINES["codec_decode"], CODEC)
    whole, stream = decoder.decode(LATENTS), decoder.stream()
    ends = sorted({*cuts, 50})
    parts = [stream.push(LATENTS[a:b], last=b == 50 and not flushed) for a, b in zip([0, *ends], ends, strict=False)]
    if flushed:
        parts.append(stream.flush())
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-6)
    np.testing.assert_array_equal(stream.push(LATENTS, last=True), whole)  # it begins anew


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (LATENTS.astype(np.float64), "float64; this codec takes latents, float32"),
        (np.zeros((8, 50), np.int64), "int64; this codec takes latents"),
        ([[0.0] * 8], "a list; this codec"),
        (LATENTS[:, :7], r"shape \[50, 7\]; \[1 to 700 frames, 8\] is expected"),
        (LATENTS[:0], r"shape \[0, 8\]"),
        (LATENTS[None], r"shape \[1, 50, 8\]"),
        (np.zeros((701, 8), np.float32), r"shape \[701, 8\]"),
        (np.full((4, 8), np.nan, np.float32), "not numbers"),
    ],
)
def test_what_are_no_latents_of_this_codec_is_refused(latents: Any, message: str) -> None:
    with pytest.raises(VoiceError, match=message):
        CodecDecoder(ENGINES["codec_decode"], CODEC).decode(latents)


def test_one_stream_takes_as_many_frames_as_the_codec() -> None:
    stream = CodecDecoder(ENGINES["codec_decode"], CODEC).stream()
    stream.push(np.zeros((690, 8), np.float32))
    with pytest.raises(VoiceError, match="11 frames of latents more; the codec takes 700 in one stream"):
        stream.push(np.zeros((11, 8), np.float32))
    assert len(stream.push(np.zeros((10, 8), np.float32))) == 1000
