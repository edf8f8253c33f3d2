"""One piece of text over the graphs: what is computed once, what a block sees, and how a piece ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fishrt.diffusion import generate
from fishrt.diffusion.denoising import Denoising
from fishrt.diffusion.generate import Denoiser, KeysValues, Utterance
from fishrt.diffusion.sampler import SeededNoise
from fishrt.diffusion.text import tokens
from fishrt.errors import GraphError, PromptError, SamplingError
from fishrt_engines.engine import is_constant
from reference_dit import ReferenceDiT, random_weights, reference_engines

DIT = ReferenceDiT(random_weights())
MODEL = DIT.model()
TEXT = tokens("[S1] Hello.")
VOICE = np.random.default_rng(1).standard_normal((12, DIT.channels), np.float32)


@pytest.fixture
def engines() -> dict[str, Any]:
    return reference_engines(DIT)


def resolved(**changes: Any) -> Denoising:
    return Denoising(**{"steps": 3, "frames": None if "blocks" in changes else 8, **changes}).resolve(MODEL)


def utterance(denoiser: Denoiser, *, text: np.ndarray = TEXT, voiced: bool = True, seed: Any = 7, **changes: Any) -> Utterance:
    before = changes.pop("before", None)
    voice = denoiser.voice(VOICE) if voiced else None
    return Utterance(denoiser, text, voice, resolved(**changes), seed, before=before)


def finish(made: Utterance) -> list[np.ndarray]:
    """Take all steps; return what was given out."""
    given = []
    while made.stop_reason is None:
        if (part := made.advance()) is not None:
            given.append(part)
    return given


def said(engines: Mapping[str, Any], **changes: Any) -> np.ndarray:
    return np.concatenate(finish(utterance(Denoiser(engines, MODEL), **changes)))


def test_text_and_voice_are_read_once_and_never_copied(engines: dict[str, Any]) -> None:
    fed: list[dict[str, Any]] = []
    run = engines["denoise"].run

    def spy(feeds: Mapping[str, Any]) -> Any:
        fed.append(dict(feeds))
        return run(feeds)

    engines["denoise"].run = spy
    finish(utterance(Denoiser(engines, MODEL), blocks=[4, 8], steps=[2, 3]))
    assert [len(engines[role].calls) for role in ("text_cond", "speaker_cond", "latent_cond", "schedule")] == [1, 1, 1, 2]
    for name in ("text_keys", "text_values", "speaker_keys", "speaker_values"):
        assert len({id(feeds[name]) for feeds in fed}) == 1
        assert is_constant(fed[0][name])
    assert fed[0]["text_keys"].shape[3] == len(TEXT)


def test_a_step_feeds_what_belongs_to_it(engines: dict[str, Any]) -> None:
    said(engines, blocks=[6, 10], steps=2, force_speaker=1.5, force_min_t=0.6, force_layers=1)
    calls = engines["denoise"].calls
    assert [call["position_ids"][0].tolist() for call in calls] == [list(range(6))] * 2 + [list(range(6, 16))] * 2
    table = DIT.schedule(np.array([0.999, 0.4995], np.float32))["modulation"].astype(np.float32)
    for n, call in enumerate(calls):
        np.testing.assert_allclose(call["modulation"][0], table[n % 2], atol=1e-6)
    # the threshold is crossed by each first step, which is still forced
    assert [call["speaker_scale"][0].tolist() for call in calls] == [[1.5, 1.0], [1.0, 1.0]] * 2


def test_schedules_are_tabulated_once_for_all_texts(engines: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = Denoiser(engines, MODEL)
    for steps in (3, 3, 4, 3):
        finish(utterance(denoiser, steps=steps))
    assert [len(call["t"]) for call in engines["schedule"].calls] == [3, 4]
    row = denoiser.modulation(3, 0.999, 2)
    assert row.shape == (1, MODEL.layers, 6, MODEL.width)
    monkeypatch.setattr(generate, "_TABLE_BYTES", 9 * row.nbytes)
    for steps in (5, 3, 4):  # 12 steps are more than 9: those of the oldest table, 4, are not kept
        denoiser.modulation(steps, 0.999, 0)
    assert [len(call["t"]) for call in engines["schedule"].calls] == [3, 4, 5, 4]
    for step in range(20):  # kept, although it is larger than all may be
        denoiser.modulation(20, 0.999, step)
    assert len(engines["schedule"].calls) == 5


def test_many_steps_are_tabulated_in_parts(engines: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = Denoiser(engines, MODEL)
    whole = [denoiser.modulation(7, 0.999, step) for step in range(7)]
    monkeypatch.setattr(generate, "TABLE_STEPS", 3)
    denoiser = Denoiser(engines, MODEL)
    np.testing.assert_array_equal([denoiser.modulation(7, 0.999, step) for step in range(7)], whole)
    assert [len(call["t"]) for call in engines["schedule"].calls] == [7, 3, 3, 1]


def test_latents_before_a_block_are_encoded_as_far_as_they_are_seen(engines: dict[str, Any]) -> None:
    given = said(engines, blocks=[6, 3, 4])
    one, two = (call["latents"][0] for call in engines["latent_cond"].calls)
    np.testing.assert_array_equal(
        one, np.concatenate([given[:6], np.zeros((2, 8))])
    )  # the frames of a patch that are not there yet
    np.testing.assert_array_equal(two, np.concatenate([given[:9], np.zeros((3, 8))]))
    masks = [call["latent_mask"][0].tolist() for call in engines["denoise"].calls]
    assert masks == [[False]] * 3 + [[True] * 2] * 3 + [[True] * 3] * 3
    assert not engines["denoise"].calls[0]["latent_keys"].any()


def test_rows_see_what_their_name_says(engines: dict[str, Any]) -> None:
    said(engines)
    first, *_, last = engines["denoise"].calls
    n = len(TEXT)
    assert first["text_mask"][0].tolist() == [[True] * n, [False] * n, [True] * n]
    assert first["speaker_mask"][0].tolist() == [[True] * 3, [True] * 3, [False] * 3]
    assert [mask.shape[1] for mask in (last["text_mask"], last["speaker_mask"])] == [1, 1]


def test_a_row_is_what_it_is_alone() -> None:
    engine = reference_engines(DIT)["denoise"]
    said({**reference_engines(DIT), "denoise": engine})
    feeds = engine.calls[0]
    whole = engine.run(feeds)["velocity"].copy()
    for row in range(3):
        alone = {
            **feeds,
            "text_mask": feeds["text_mask"][:, row : row + 1],
            "speaker_mask": feeds["speaker_mask"][:, row : row + 1],
        }
        np.testing.assert_array_equal(engine.run(alone)["velocity"][:, 0], whole[:, row])
    assert not np.allclose(whole[:, 0], whole[:, 1])
    assert not np.allclose(whole[:, 0], whole[:, 2])


def test_without_a_voice_there_is_no_row_for_it(engines: dict[str, Any]) -> None:
    said(engines, voiced=False)
    call = engines["denoise"].calls[0]
    assert call["speaker_mask"].tolist() == [[[False], [False]]]
    assert not call["speaker_keys"].any()
    assert not engines["speaker_cond"].calls


def test_the_streaming_variant_has_a_text_without_words(engines: dict[str, Any]) -> None:
    denoiser = Denoiser(engines, MODEL)
    for _ in range(2):
        finish(utterance(denoiser, variant="streaming"))
    assert [call["tokens"].tolist() for call in engines["text_cond"].calls] == [[TEXT.tolist()], [[0]], [TEXT.tolist()]]
    call, n = engines["denoise"].calls[0], len(TEXT)
    words, nothing = [True] * n + [False], [False] * n + [True]
    assert call["text_mask"][0].tolist() == [words, nothing, words]
    np.testing.assert_array_equal(call["text_keys"][:, :, :, n:], denoiser.wordless().keys)


def test_texts_side_by_side_are_what_they_are_alone(engines: dict[str, Any]) -> None:
    """Each call of an engine overwrites the results of the call before."""
    others = {"text": tokens("(x) Another text."), "seed": 8, "blocks": [4, 4], "steps": 2, "voiced": False}
    alone = [said(reference_engines(DIT)), said(reference_engines(DIT), **others)]
    denoiser = Denoiser(engines, MODEL)
    made, given = [utterance(denoiser), utterance(denoiser, **others)], [[], []]
    while any(one.stop_reason is None for one in made):
        for one, parts in zip(made, given, strict=True):
            if one.stop_reason is None and (part := one.advance()) is not None:
                parts.append(part)
    for parts, wanted in zip(given, alone, strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), wanted)


def test_the_same_seed_gives_the_same_latents() -> None:
    first = said(reference_engines(DIT))
    np.testing.assert_array_equal(said(reference_engines(DIT)), first)
    np.testing.assert_array_equal(said(reference_engines(DIT), seed=SeededNoise(7)), first)
    assert not np.array_equal(said(reference_engines(DIT), seed=8), first)


def test_one_block_is_the_whole() -> None:
    np.testing.assert_array_equal(said(reference_engines(DIT), blocks=[8]), said(reference_engines(DIT), frames=8))
    model = DIT.model(blockwise=False)
    engines = reference_engines(ReferenceDiT(random_weights(blockwise=False)))
    plain = Utterance(Denoiser(engines, model), TEXT, None, resolved(), 7)
    assert np.concatenate(finish(plain)).shape == (8, MODEL.channels)
    assert "latent_keys" not in engines["denoise"].calls[0]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_any_blocks_make_all_frames(blocks: list[int]) -> None:
    """None is a multiple of a patch by itself; a shorter window is as legal as any."""
    made = utterance(Denoiser(reference_engines(DIT), MODEL), blocks=blocks, steps=2, early_stop=False)
    given = finish(made)
    assert sum(map(len, given)) == made.frames == sum(blocks)
    assert (made.step, made.steps, made.stop_reason) == (2 * len(blocks), 2 * len(blocks), "max_frames")


def test_speech_is_continued_as_by_another_block() -> None:
    """The second block of two is that of a continuation of the first, given its noise."""
    both = said(reference_engines(DIT), blocks=[6, 8])
    noise = SeededNoise(7)
    noise.draw(6, MODEL.channels)
    more = said(reference_engines(DIT), blocks=[8], before=both[:6], seed=noise)
    np.testing.assert_allclose(more, both[6:], atol=1e-6)


class Oracle:
    """A denoiser whose velocity leads to known latents."""

    def __init__(self, inner: Any, target: np.ndarray, times: Any) -> None:
        self.inner, self.target, self.times, self.spec = inner, target, times, inner.spec

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        velocity = self.inner.run(feeds)["velocity"]
        aim = self.target[feeds["position_ids"][0]]
        velocity[:] = ((feeds["latents"][0] - aim) / next(self.times))[None, None]
        return {"velocity": velocity}


def oracle(target: np.ndarray, times: list[float], **changes: Any) -> tuple[Utterance, list[np.ndarray]]:
    engines = reference_engines(DIT)
    made = utterance(
        Denoiser({**engines, "denoise": Oracle(engines["denoise"], target, iter(times))}, MODEL),
        steps=1,
        init_scale=1.0,
        **changes,
    )
    return made, finish(made)


def test_speech_that_ends_early_ends_the_piece() -> None:
    target = np.zeros((64, MODEL.channels), np.float32)
    target[:21] = np.random.default_rng(0).standard_normal((21, MODEL.channels))
    made, given = oracle(target, [1.0] * 3, blocks=[16, 32, 16])
    assert [len(part) for part in given] == [16, 5]
    np.testing.assert_allclose(np.concatenate(given), target[:21], atol=1e-6)
    assert (made.stop_reason, made.step, made.steps, made.frames) == ("end", 2, 3, 21)


def test_speech_that_fills_the_window_is_cut_off() -> None:
    target = np.random.default_rng(0).standard_normal((24, MODEL.channels)).astype(np.float32)
    made, given = oracle(target, [1.0] * 2, blocks=[16, 8])
    assert (made.stop_reason, sum(map(len, given))) == ("max_frames", 24)


def test_speech_after_a_long_pause_is_told() -> None:
    target = np.random.default_rng(0).standard_normal((64, MODEL.channels)).astype(np.float32)
    target[20:42] = 0
    made, given = oracle(target, [1.0], blocks=[64])
    assert (made.stop_reason, sum(map(len, given))) == ("pause", 20)


def test_a_text_that_is_too_long_is_refused(engines: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match="769 tokens; the model takes 768"):
        utterance(Denoiser(engines, MODEL), text=tokens("x" * 768))


def test_what_is_continued_must_leave_room(engines: dict[str, Any]) -> None:
    before = np.zeros((40, MODEL.channels), np.float32)
    assert utterance(Denoiser(engines, MODEL), before=before, frames=600)
    with pytest.raises(SamplingError, match="601 frames are wanted after 40 others"):
        utterance(Denoiser(engines, MODEL), before=before, frames=601)
    plain = Denoiser(engines, DIT.model(blockwise=False))
    with pytest.raises(SamplingError, match="cannot be continued"):
        utterance(plain, before=before)


def test_weights_that_are_not_numbers_are_an_error() -> None:
    weights = random_weights()
    weights["out_proj.bias"][3] = np.nan
    with pytest.raises(GraphError, match="not numbers"):
        said(reference_engines(ReferenceDiT(weights)))


def test_keys_and_values_tell_their_bytes(engines: dict[str, Any]) -> None:
    voice = Denoiser(engines, MODEL).voice(VOICE)
    assert isinstance(voice, KeysValues)
    assert (voice.positions, voice.nbytes) == (3, 2 * 4 * MODEL.layers * MODEL.heads * 3 * MODEL.head_dim)
