"""Padding, ranges and limits around the codec graphs, and decoding while codes come, over fake engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import FakeEngine, FakeState, fake_engines
from fishrt.bundle.features import Codec, DecodeContext, Quirks
from fishrt.codec import CodecDecoder, CodecEncoder, OverlapStream, StatefulStream, check_codes, clamp_codes
from fishrt.errors import AudioError, GraphError, VoiceError
from fishrt_engines import GraphSpec, StatePair, TensorSpec
from helpers_text import language_model

CODEC = Codec(
    sample_rate=16000,
    hop=4,
    codebook_sizes=(20, 8, 8),
    max_frames=10,
    min_samples=1,
    sample_multiple=4,
    context=DecodeContext(left=0, ahead=0),
    fingerprint="f",
)


@pytest.fixture
def engines() -> dict[str, FakeEngine]:
    return fake_engines(language_model(), CODEC)


@pytest.mark.parametrize(("samples", "frames"), [(1, 1), (4, 1), (5, 2), (8, 2), (40, 10)])
def test_audio_is_filled_up_to_whole_frames(engines: dict[str, FakeEngine], samples: int, frames: int) -> None:
    codes = CodecEncoder(engines["codec_encode"], CODEC).encode(np.ones(samples, np.float32))
    assert (codes.shape, codes.dtype) == ((3, frames), np.int64)
    fed = engines["codec_encode"].calls[0]["audio"]
    assert fed.tolist() == [[[1.0] * samples + [0.0] * (4 * frames - samples)]]


@pytest.mark.parametrize(("samples", "multiple"), [(7, 1), (8, 1), (9, 3), (10, 3)])
def test_audio_is_filled_up_only_as_far_as_the_codec_asks(samples: int, multiple: int) -> None:
    codec = replace(CODEC, sample_multiple=multiple, min_samples=7)
    spec = fake_engines(language_model(), codec)["codec_encode"].spec
    engine = FakeEngine(spec, lambda feeds, state: {"codes": np.zeros((1, 3, 2), np.int64)})
    assert CodecEncoder(engine, codec).encode(np.ones(samples, np.float32)).shape == (3, 2)
    assert engine.calls[0]["audio"].shape == (1, 1, -(-samples // multiple) * multiple)
    assert engine.calls[0]["audio"].sum() == samples
    with pytest.raises(AudioError, match="has 6 samples; the codec takes at least 7"):
        CodecEncoder(engine, codec).encode(np.ones(6, np.float32))
    with pytest.raises(AudioError, match="at most"):
        CodecEncoder(engine, codec).encode(np.ones(41, np.float32))
    assert len(engine.calls) == 1


@pytest.mark.parametrize(
    ("pcm", "says"),
    [
        (np.zeros(0, np.float32), "empty"),
        (np.zeros(41, np.float32), "at most"),
        (np.array([0, np.nan], np.float32), "not numbers"),
        (np.array([0, np.inf], np.float32), "not numbers"),
        (np.zeros((2, 8), np.float32), r"\[2, 8\]"),
        (np.zeros(8), "float64"),
    ],
)
def test_audio_that_the_codec_does_not_take_is_refused(engines: dict[str, FakeEngine], pcm: np.ndarray, says: str) -> None:
    with pytest.raises(AudioError, match=says):
        CodecEncoder(engines["codec_encode"], CODEC).encode(pcm)
    assert not engines["codec_encode"].calls


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint32", "int64", "uint64"])
def test_codes_of_any_integer_type_are_decoded(engines: dict[str, FakeEngine], dtype: str) -> None:
    codes = np.array([[19, 0], [7, 1], [0, 2]], dtype)
    pcm = CodecDecoder(engines["codec_decode"], CODEC).decode(codes)
    assert pcm.dtype == np.float32
    np.testing.assert_allclose(pcm, [0.026] * 4 + [0.003] * 4, atol=1e-7)
    np.testing.assert_array_equal(CodecDecoder(engines["codec_decode"], CODEC).decode(codes[None]), pcm)


def test_missing_rows_are_fed_as_absent(engines: dict[str, FakeEngine]) -> None:
    CodecDecoder(engines["codec_decode"], CODEC).decode(np.array([[3, 4]]))
    assert engines["codec_decode"].calls[0]["codes"].tolist() == [[[3, 4], [-1, -1], [-1, -1]]]


@pytest.mark.parametrize(
    ("codes", "says"),
    [
        ([[0, -1], [0, 0], [0, 0]], "-1 in codebook 0"),
        ([[0, 0], [0, 0], [-7, 0]], "-7 in codebook 2"),
        ([[0, 20], [0, 0], [0, 0]], "20 in codebook 0, which has the entries 0 to 19"),
        ([[0, 0], [8, 0], [0, 0]], "8 in codebook 1, which has the entries 0 to 7"),
    ],
)
def test_values_outside_a_codebook_are_named(codes: list[list[int]], says: str) -> None:
    with pytest.raises(VoiceError, match=says):
        check_codes(np.array(codes), CODEC)


def test_upstream_takes_too_large_values_for_the_last_entry() -> None:
    codes = np.array([[5, 99], [8, 7], [0, 1000]])
    kept = codes.copy()
    assert check_codes(codes, CODEC, Quirks(sound=True)).tolist() == [[5, 19], [7, 7], [0, 7]]
    np.testing.assert_array_equal(codes, kept)
    with pytest.raises(VoiceError, match="-1"):
        check_codes(np.array([[-1]]), CODEC, Quirks(sound=True))


@pytest.mark.parametrize(
    ("codes", "says"),
    [
        (np.zeros((4, 2), int), r"\[4, 2\]"),
        (np.zeros((0, 2), int), r"\[0, 2\]"),
        (np.zeros((2, 3, 2), int), r"\[2, 3, 2\]"),
        (np.zeros(3, int), r"\[3\]"),
        (np.zeros((3, 0), int), "0 frames"),
        (np.zeros((3, 11), int), "11 frames"),
        (np.zeros((3, 2)), "float64"),
        (np.zeros((3, 2), bool), "bool"),
    ],
)
def test_arrays_that_are_no_codes_are_refused(codes: np.ndarray, says: str) -> None:
    with pytest.raises(VoiceError, match=says):
        check_codes(codes, CODEC)


def test_clamping_touches_only_what_is_too_large() -> None:
    assert clamp_codes(np.array([[19, 20], [0, 9]]), CODEC).tolist() == [[19, 19], [0, 7]]


def test_a_waveform_that_is_not_numbers_is_an_error(engines: dict[str, FakeEngine]) -> None:
    spec = engines["codec_decode"].spec
    broken = FakeEngine(spec, lambda feeds, state: {"audio": np.full((1, 1, 8), np.nan, np.float32)})
    with pytest.raises(GraphError, match="not numbers"):
        CodecDecoder(broken, CODEC).decode(np.zeros((3, 2), int))


# ---- streams


LEFT, AHEAD = 3, 2
WINDOWED = replace(CODEC, max_frames=30, context=DecodeContext(LEFT, AHEAD))


def windowed_engine() -> FakeEngine:
    """Return an engine whose result for a frame depends on it, the LEFT frames before and the AHEAD frames after it only."""

    def decode(feeds: Mapping[str, np.ndarray], state: None) -> dict[str, np.ndarray]:
        first = feeds["codes"][0, 0] + 1.0  # distinguishes code 0 from frames past the ends
        around = np.pad(first, (LEFT, AHEAD))
        weights = 10.0 ** np.arange(LEFT + 1 + AHEAD)
        frames = [around[t : t + len(weights)] @ weights for t in range(len(first))]
        return {"audio": np.repeat(frames, WINDOWED.hop).astype(np.float32)[None, None]}

    return FakeEngine(fake_engines(language_model(), WINDOWED)["codec_decode"].spec, decode)


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), max_size=8))
def test_a_stream_gives_what_decoding_gives(chunks: list[int]) -> None:
    """Results are equal for every cut; a frame is decoded once AHEAD frames follow; and only needed frames are kept."""
    codes = np.random.default_rng(1).integers(0, 8, (3, sum(chunks)))
    engine, heard, given_frames = windowed_engine(), 0, []
    stream = OverlapStream(engine, WINDOWED)
    for n in chunks:
        given_frames.append(stream.push(codes[:, heard : heard + n]))
        heard += n
        assert sum(map(len, given_frames)) == max(heard - AHEAD, 0) * WINDOWED.hop
        assert all(call["codes"].shape[2] <= LEFT + AHEAD + 9 for call in engine.calls)
    pcm = np.concatenate([*given_frames, stream.flush()])
    whole = CodecDecoder(windowed_engine(), replace(WINDOWED, max_frames=100)).decode(codes) if chunks else np.empty(0)
    np.testing.assert_array_equal(pcm, whole)
    assert len(stream.flush()) == 0


def test_a_stream_begins_anew_after_its_end() -> None:
    codes, stream = np.arange(8).reshape(1, 8), OverlapStream(windowed_engine(), WINDOWED)
    first, again = (np.concatenate([stream.push(codes[:, :5]), stream.push(codes[:, 5:]), stream.flush()]) for _ in range(2))
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("kind", [OverlapStream, StatefulStream])
def test_codes_are_checked_once_where_they_come_in(kind: type[OverlapStream] | type[StatefulStream]) -> None:
    """A stream is in the house: it takes what `check_codes` or the job has let in."""
    engine, codec = (windowed_engine(), WINDOWED) if kind is OverlapStream else (counting_engine(positions=False), STATEFUL)
    strange = np.full((3, 1), 8)
    for wrong, says in (
        (strange, "8 in codebook 1"),
        (np.ones((3, 0), int), "0 frames"),
        (np.ones((3, 31), int), "31 frames of codes; the codec takes 1 to 30"),
    ):
        with pytest.raises(VoiceError, match=says):
            CodecDecoder(engine, codec).decode(wrong)
    assert not engine.calls
    CodecDecoder(engine, codec).stream().push(strange, last=True)
    assert engine.calls[0]["codes"].tolist() == [[[8]] * 3]


def test_missing_rows_are_absent_in_a_stream_too() -> None:
    engine = windowed_engine()
    OverlapStream(engine, WINDOWED).push(np.array([[3, 4, 5]]))
    assert engine.calls[0]["codes"].tolist() == [[[3, 4, 5], [-1] * 3, [-1] * 3]]


def test_long_codes_are_decoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call decodes more frames than the limit, and flushing needs no further call."""
    monkeypatch.setattr("fishrt.codec._MOST_FRAMES", 10)
    long = replace(WINDOWED, max_frames=70)
    codes, engine = np.random.default_rng(2).integers(0, 8, (3, 70)), windowed_engine()
    decoder = CodecDecoder(engine, long)
    assert decoder.chunk_frames == (5, 40)
    pcm = decoder.decode(codes)
    assert [call["codes"].shape[2] for call in engine.calls] == [40, LEFT + AHEAD + 30]
    np.testing.assert_array_equal(pcm, windowed_engine().run({"codes": codes[None]})["audio"][0, 0])
    assert CodecDecoder(engine, replace(WINDOWED, max_frames=12)).chunk_frames == (5, 7)


def counting_engine(*, positions: bool) -> FakeEngine:
    """Return an engine that decodes a frame to the running sum of first-row codes, and checks the positions."""
    spec = fake_engines(language_model(), CODEC)["codec_decode"].spec
    total = TensorSpec("columns.0", "float32", ("batch", 1, 1))
    position_ids = (TensorSpec("position_ids", "int64", ("batch", "frames")),) if positions else ()
    spec = GraphSpec(
        spec.file,
        (*spec.inputs, *position_ids, total),
        (*spec.outputs, replace(total, name="columns_out.0")),
        (StatePair("columns.0", "columns_out.0"),),
    )

    def decode(feeds: Mapping[str, np.ndarray], state: FakeState) -> dict[str, np.ndarray]:
        start, frames = state.memory[0].get("frames", 0), feeds["codes"].shape[2]
        if positions:
            assert feeds["position_ids"].tolist() == [list(range(start, start + frames))]
        state.memory[0]["frames"] = start + frames
        sums = state.arrays["columns.0"][0, 0, 0] + np.cumsum(feeds["codes"][0, 0])
        state.arrays["columns.0"][...] = sums[-1]
        return {"audio": np.repeat(sums, CODEC.hop).astype(np.float32)[None, None]}

    return FakeEngine(spec, decode)


STATEFUL = replace(CODEC, max_frames=30, context=None)


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), max_size=3), st.booleans())
def test_a_stream_with_state_gives_each_frame_at_once(chunks: list[int], positions: bool) -> None:
    codes = np.random.default_rng(3).integers(0, 8, (3, sum(chunks)))
    stream, heard = CodecDecoder(counting_engine(positions=positions), STATEFUL).stream(), 0
    expected = np.repeat(np.cumsum(codes[0]), CODEC.hop)
    for n in chunks:
        pcm = stream.push(codes[:, heard : heard + n])
        np.testing.assert_array_equal(pcm, expected[heard * CODEC.hop : (heard + n) * CODEC.hop])
        heard += n
    assert len(stream.flush()) == 0
    if chunks:
        np.testing.assert_array_equal(CodecDecoder(counting_engine(positions=positions), STATEFUL).decode(codes), expected)


def test_long_codes_are_fed_in_parts_to_a_graph_with_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fishrt.codec._MOST_FRAMES", 8)
    engine, codes = counting_engine(positions=True), np.ones((3, 30), int)
    pcm = CodecDecoder(engine, STATEFUL).decode(codes)
    assert [call["codes"].shape[2] for call in engine.calls] == [8, 8, 8, 6]
    np.testing.assert_array_equal(pcm, np.repeat(np.arange(1, 31), CODEC.hop))


def test_a_stream_with_state_ends_and_begins_anew() -> None:
    engine = counting_engine(positions=True)
    stream = CodecDecoder(engine, STATEFUL).stream()
    stream.push(np.ones((3, 20), int))
    with pytest.raises(VoiceError, match="11 frames of codes more; the codec takes 30 in one stream"):
        stream.push(np.ones((3, 11), int))
    stream.push(np.ones((3, 10), int), last=True)
    assert stream.push(np.ones((3, 1), int)).tolist() == [1.0] * CODEC.hop
    stream.flush()
    assert stream.push(np.ones((3, 1), int)).tolist() == [1.0] * CODEC.hop
    assert len(engine.states) == 3


@pytest.mark.parametrize("kind", [OverlapStream, StatefulStream])
def test_the_last_push_needs_no_flush(kind: type[OverlapStream] | type[StatefulStream]) -> None:
    make = {OverlapStream: lambda: windowed_engine(), StatefulStream: lambda: counting_engine(positions=False)}[kind]
    codes = np.random.default_rng(4).integers(0, 8, (3, 9))
    first, second = kind(make(), WINDOWED), kind(make(), WINDOWED)
    flushed = np.concatenate([first.push(codes[:, :4]), first.push(codes[:, 4:]), first.flush()])
    np.testing.assert_array_equal(np.concatenate([second.push(codes[:, :4]), second.push(codes[:, 4:], last=True)]), flushed)
    assert len(second.flush()) == 0


def test_a_graph_that_can_only_decode_a_whole_is_refused(engines: dict[str, FakeEngine]) -> None:
    with pytest.raises(GraphError, match="carries no state"):
        CodecDecoder(engines["codec_decode"], replace(CODEC, context=None))
