"""Decoding while codes come, through exported graphs: nothing but rounding differs from decoding them at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fishrt.codec import CodecDecoder, CodecStream
from fishrt.features import Codec, DecodeContext
from fishrt_engines import Engine
from fishrt_export.codec.firefly import Firefly, FireflyConfig
from fishrt_export.codec.load import official_firefly
from tiny import GoldenModel
from tolerances import TOLERANCES


@pytest.fixture(scope="module")
def codec(golden_model: GoldenModel) -> Codec:
    codec = golden_model.codec.describe()
    if codec.context is None:
        pytest.skip("this codec cannot be decoded piece by piece")
    return codec


@pytest.fixture(scope="module")
def engine(golden_model: GoldenModel, codec: Codec) -> Engine:
    return golden_model.engine("codec_decode")


def random_codes(codec: Codec, frames: int, seed: int) -> np.ndarray:
    sizes = np.array(codec.codebook_sizes)[:, None]
    return np.random.default_rng(seed).integers(0, sizes, (len(sizes), frames))


@pytest.mark.parametrize("seed", range(6))
def test_any_chunks_give_the_whole(engine: Engine, codec: Codec, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = random_codes(codec, int(rng.integers(1, 60)), seed)
    edges = np.unique(rng.integers(0, codes.shape[1] + 1, int(rng.integers(0, 12))))
    chunks = [chunk for chunk in np.split(codes, edges, axis=1) if chunk.shape[1]]
    stream = CodecStream(engine, codec)
    pcm = np.concatenate([*(stream.push(chunk) for chunk in chunks), stream.flush()])
    whole = CodecDecoder(engine, codec).decode(codes)
    assert pcm.shape == whole.shape
    assert np.abs(pcm - whole).max() <= TOLERANCES["stream"]


def test_frames_one_by_one_give_the_whole(engine: Engine, codec: Codec) -> None:
    codes = random_codes(codec, 40, 7)
    stream = CodecStream(engine, codec)
    pcm = np.concatenate([*(stream.push(codes[:, t : t + 1]) for t in range(40)), stream.flush()])
    assert np.abs(pcm - CodecDecoder(engine, codec).decode(codes)).max() <= TOLERANCES["stream"]


def test_less_context_is_heard(engine: Engine, codec: Codec) -> None:
    """The measure above can fail."""
    codes = random_codes(codec, 40, 8)
    whole = CodecDecoder(engine, codec).decode(codes)
    assert codec.context is not None
    for context in (
        DecodeContext(4, codec.context.ahead),
        *([DecodeContext(codec.context.left, 4)] if codec.context.ahead else []),
    ):
        stream = CodecStream(engine, replace(codec, context=context))
        pcm = np.concatenate([stream.push(codes[:, :20]), stream.push(codes[:, 20:]), stream.flush()])
        assert np.abs(pcm - whole).max() > 100 * TOLERANCES["stream"]


def test_the_context_is_what_the_network_sees(golden_model: GoldenModel, codec: Codec) -> None:
    """In float64, another frame changes the sound from `ahead` frames before it to `left` frames after it, and nowhere else."""
    firefly = golden_model.codec.module()
    assert isinstance(firefly, Firefly)
    assert codec.context is not None
    at, frames = 24, 48
    codes = torch.from_numpy(random_codes(codec, frames, 9))[None]
    other = codes.clone()
    other[..., at] = (other[..., at] + 1) % codec.codebook_sizes[0]
    with torch.no_grad():
        zq = [firefly.quantizer.residual_fsq.decode(one).double() for one in (codes, other)]
        firefly.double()
        first, second = (firefly.head(firefly.quantizer.upsample(features)) for features in zq)
    changed = (first != second)[0, 0].reshape(frames, codec.hop).any(dim=1).nonzero()[:, 0]
    assert (int(changed[0]), int(changed[-1])) == (at - codec.context.ahead, at + codec.context.left)


@pytest.mark.parametrize(("causal", "context"), [(True, DecodeContext(15, 0)), (False, DecodeContext(10, 10))])
def test_the_official_context(causal: bool, context: DecodeContext) -> None:
    """As measured on the originals."""
    assert FireflyConfig.from_json(official_firefly(causal=causal), causal=causal).context == context
