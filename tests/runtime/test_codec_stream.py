"""Streamed decoding through exported graphs: only rounding differs from decoding at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fishrt.bundle.features import Codec, DecodeContext
from fishrt.codec import CodecDecoder, OverlapStream, StatefulStream
from fishrt_engines import Engine
from fishrt_export.models.codec.firefly import Firefly, FireflyConfig
from fishrt_export.models.codec.load import official_firefly
from tiny import GoldenModel
from tolerances import TOLERANCES


@pytest.fixture(scope="module")
def codec(golden_model: GoldenModel) -> Codec:
    return golden_model.codec.describe()


@pytest.fixture(scope="module")
def engine(golden_model: GoldenModel) -> Engine:
    return golden_model.engine("codec_decode")


def random_codes(codec: Codec, frames: int, seed: int) -> np.ndarray:
    sizes = np.array(codec.codebook_sizes)[:, None]
    return np.random.default_rng(seed).integers(0, sizes, (len(sizes), frames))


def decoded_at_once(engine: Engine, codes: np.ndarray) -> np.ndarray:
    """Return the audio of one call of the graph."""
    feeds = {"codes": codes[None], "position_ids": np.arange(codes.shape[1])[None]}
    state = engine.new_state(batch=1) if engine.spec.states else None
    return engine.run({t.name: feeds[t.name] for t in engine.spec.feeds}, state)["audio"][0, 0].copy()


@settings(max_examples=20, deadline=None)
@given(chunks=st.lists(st.integers(1, 24), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_any_chunks_give_the_whole(engine: Engine, codec: Codec, chunks: list[int], seed: int) -> None:
    codes = random_codes(codec, sum(chunks), seed)
    stream = CodecDecoder(engine, codec).stream()
    parts = np.split(codes, np.cumsum(chunks)[:-1], axis=1)
    pcm = np.concatenate([*(stream.push(part) for part in parts), stream.flush()])
    whole = decoded_at_once(engine, codes)
    assert pcm.shape == whole.shape
    assert np.abs(pcm - whole).max() <= TOLERANCES["stream"]


def test_frames_one_by_one_give_the_whole(engine: Engine, codec: Codec) -> None:
    """The codes are longer than any layer's context."""
    codes = random_codes(codec, 60, 7)
    stream = CodecDecoder(engine, codec).stream()
    pcm = np.concatenate([*(stream.push(codes[:, t : t + 1]) for t in range(60)), stream.flush()])
    assert np.abs(pcm - decoded_at_once(engine, codes)).max() <= TOLERANCES["stream"]


def test_decoding_is_a_stream(engine: Engine, codec: Codec) -> None:
    """The codes have more frames than one call takes."""
    codes = random_codes(codec, 200, 8)
    decoder = CodecDecoder(engine, codec)
    assert codes.shape[1] > decoder.chunk_frames[1]
    assert np.abs(decoder.decode(codes) - decoded_at_once(engine, codes)).max() <= TOLERANCES["stream"]


def test_a_state_that_is_lost_is_heard(engine: Engine, codec: Codec) -> None:
    """The tests above can fail: without any one tensor of the state, the audio differs."""
    if not engine.spec.states:
        pytest.skip("this codec is decoded without a state")
    codes = random_codes(codec, 40, 8)
    whole = decoded_at_once(engine, codes)
    for tensor in engine.spec.state_tensors:
        stream = StatefulStream(engine, codec)
        stream.push(codes[:, :20])
        assert stream._state is not None
        stream._state.write(tensor.name, np.zeros_like(stream._state.read(tensor.name)))
        pcm = stream.push(codes[:, 20:])
        assert np.abs(pcm - whole[20 * codec.hop :]).max() > 10 * TOLERANCES["stream"], tensor.name


def test_less_context_is_heard(engine: Engine, codec: Codec) -> None:
    """The tests above can fail: with less context, the audio differs."""
    if engine.spec.states:
        pytest.skip("this codec is decoded with a state")
    codes = random_codes(codec, 40, 8)
    whole = decoded_at_once(engine, codes)
    assert codec.context is not None
    for context in (DecodeContext(4, codec.context.ahead), DecodeContext(codec.context.left, 4)):
        stream = OverlapStream(engine, replace(codec, context=context))
        pcm = np.concatenate([stream.push(codes[:, :20]), stream.push(codes[:, 20:]), stream.flush()])
        assert np.abs(pcm - whole).max() > 100 * TOLERANCES["stream"]


def test_rows_of_a_batch_may_stand_at_different_positions(engine: Engine, codec: Codec) -> None:
    """One row begins with a state of zeros, the other continues."""
    if "position_ids" not in {t.name for t in engine.spec.feeds}:
        pytest.skip("this codec has no positions")
    early, late = random_codes(codec, 30, 9), random_codes(codec, 50, 10)
    single, both = engine.new_state(batch=1), engine.new_state(batch=2)
    engine.run({"codes": late[None, :, :20], "position_ids": np.arange(20)[None]}, single)
    for pair in engine.spec.states:
        both.write(pair.input, np.stack([both.read(pair.input)[0], single.read(pair.input)[0]]))
    feeds = {"codes": np.stack([early, late[:, 20:]]), "position_ids": np.stack([np.arange(30), np.arange(20, 50)])}
    audio = engine.run(feeds, both)["audio"][:, 0]
    assert np.abs(audio[0] - decoded_at_once(engine, early)).max() <= TOLERANCES["stream"]
    assert np.abs(audio[1] - decoded_at_once(engine, late)[20 * codec.hop :]).max() <= TOLERANCES["stream"]


def test_the_context_is_what_the_network_sees(golden_model: GoldenModel, codec: Codec) -> None:
    """In float64, another frame changes the sound from `ahead` frames before it to `left` frames after it, and nowhere else."""
    if codec.context is None:
        pytest.skip("every earlier frame counts")
    firefly = golden_model.codec.module()
    assert isinstance(firefly, Firefly)
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
