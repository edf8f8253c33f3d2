"""Requests that are spoken together: each gets what it gets alone, whoever comes, goes, reads slowly or fails."""

from __future__ import annotations

import asyncio
import itertools
import math
import pickle
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fishrt import TTS, Request, Sampling, Speech
from fishrt.errors import ArgumentError, BusyError, FishrtError, GraphError, PromptError, TimeLimitError, UnfinishedError
from fishrt.speaking.job import Spoken
from fishrt.speaking.known import KnownSpeech
from fishrt.speaking.scheduler import ScheduledStream, Scheduler
from fishrt.speaking.stream import SpeechStream, growing_chunks, whole_chunks
from fishrt.speaking.turns import Turns
from fishrt.speech import Progress

TEXTS = ("Good morning.", "One, two, three. And four!", "The birch canoe slid on the smooth planks. Glue the sheet.")


@pytest.fixture(scope="module")
def tts() -> Iterator[TTS]:
    """The embedded voice on one thread."""
    with TTS.load(provider="cpu", threads=1) as loaded:
        yield loaded


@pytest.fixture
def scheduler(tts: TTS) -> Iterator[Scheduler]:
    made = Scheduler(tts, max_active=3, max_queue=2)
    yield made
    made.close()


def request(n: int, **options: Any) -> Request:
    return Request(TEXTS[n % len(TEXTS)], seed=n, max_frames=options.pop("max_frames", 12), **options)


ALONE: dict[tuple[int, int], Speech] = {}


def alone(tts: TTS, n: int, max_frames: int = 12) -> Speech:
    if (n, max_frames) not in ALONE:
        ALONE[n, max_frames] = tts.speak(request(n, max_frames=max_frames))
    return ALONE[n, max_frames]


def check(tts: TTS, n: int, speech: Speech, max_frames: int = 12) -> None:
    """Check a speech that was made together with others: its codes are those of the request alone."""
    expected = alone(tts, n, max_frames)
    np.testing.assert_array_equal(speech.codes, expected.codes)
    np.testing.assert_allclose(speech.pcm, expected.pcm, atol=1e-4)
    assert speech.info.stop_reasons == expected.info.stop_reasons


def until(condition: Any) -> None:
    """Wait for another thread."""
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("nothing happened for 10 s")


def test_many_requests_give_what_each_gives_alone(tts: TTS) -> None:
    speeches = list(tts.speak_many(map(request, range(12))))
    for n, speech in enumerate(speeches):
        check(tts, n, speech)


def test_they_share_their_steps(tts: TTS) -> None:
    scheduler = Scheduler(tts, max_active=4)
    streams = [scheduler.submit(request(n, max_frames=30)) for n in range(4)]
    for stream in streams:
        stream.whole()
    stats = scheduler.stats
    scheduler.close()
    assert (stats.submitted, stats.finished, stats.waiting, stats.active) == (4, 4, 0, 0)
    assert stats.rows > 1.5 * stats.steps


@given(
    schedule=st.lists(
        st.one_of(
            st.tuples(st.just("submit"), st.integers(0, 5), st.integers(0, 2)),
            st.tuples(st.just("turns"), st.integers(1, 12), st.just(0)),
            st.tuples(st.just("close"), st.integers(0, 3), st.just(0)),
            st.tuples(st.just("read"), st.integers(0, 3), st.integers(1, 3)),
            st.tuples(st.just("play"), st.integers(0, 3), st.integers(-2, 2)),
        ),
        max_size=20,
    )
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_schedule_gives_what_single_requests_give(tts: TTS, schedule: list[tuple[str, int, int]]) -> None:
    """In one thread, so that a schedule is repeatable: jobs come, are read and are closed between any two turns."""
    turns, going = tts.opened()(3), list[tuple[int, SpeechStream, list[Any]]]()
    made = list[tuple[int, SpeechStream, list[Any]]]()
    for verb, what, other in schedule:
        if verb == "submit" and len(turns.jobs) < 3:
            sizes = (growing_chunks, whole_chunks, lambda least, most: itertools.repeat(1))[other]
            job = tts.job(request(what), None, sizes)
            job.most_buffered_s = 0.3
            turns.add(job, tts.gain(job.task))
            going.append((what, SpeechStream(job, lambda: list(turns.turn())), []))
            made.append(going[-1])
        elif verb == "turns":
            for _ in range(what):
                list(turns.turn())
        elif verb == "read" and what < len(going):
            _, stream, chunks = going[what]
            chunks += itertools.islice(stream, other)
        elif verb == "close" and what < len(going):
            going.pop(what)[1].close()
        elif verb == "play" and what < len(going):  # its reader is ahead of the others, or behind
            going[what][1]._job.heard_until = time.perf_counter() + other
    for _, stream, chunks in going:
        chunks += stream
    for n, stream, chunks in made:
        codes = np.concatenate([np.zeros((alone(tts, n).codes.shape[0], 0), np.int64), *(c.codes for c in chunks)], axis=1)
        pcm, expected = np.concatenate([np.zeros(0, np.float32), *(c.pcm for c in chunks)]), alone(tts, n)
        closed = stream._job.closed.is_set()
        np.testing.assert_array_equal(codes, expected.codes[:, : codes.shape[1] if closed else None])
        np.testing.assert_allclose(pcm, expected.pcm[: len(pcm) if closed else None], atol=1e-4)


def test_for_and_async_for_say_the_same(tts: TTS, scheduler: Scheduler) -> None:
    async def collect(streams: list[ScheduledStream]) -> list[Any]:
        async def of(stream: ScheduledStream) -> list[Any]:
            return [chunk async for chunk in stream]

        return list(await asyncio.gather(*map(of, streams)))

    found = asyncio.run(collect([scheduler.submit(request(n)) for n in range(5)]))
    for n, chunks in enumerate(found):
        np.testing.assert_array_equal(np.concatenate([c.codes for c in chunks], axis=1), alone(tts, n).codes)


def test_a_full_queue_refuses(tts: TTS, scheduler: Scheduler) -> None:
    streams = [scheduler.submit(request(n, max_frames=400)) for n in range(5)]
    until(lambda: scheduler.stats.active == 3)
    with pytest.raises(BusyError) as caught:
        scheduler.submit(request(0))
    assert 1 <= caught.value.retry_s <= 30
    assert scheduler.stats.refused == 1
    for stream in streams:
        stream.close()
    until(lambda: not scheduler.stats.active)
    check(tts, 0, scheduler.submit(request(0)).whole())


def test_a_closed_request_ends_whether_it_speaks_or_waits(tts: TTS, scheduler: Scheduler) -> None:
    speaking = [scheduler.submit(request(n, max_frames=400)) for n in range(3)]
    next(speaking[0])
    until(lambda: scheduler.stats.active == 3)
    waiting = scheduler.submit(request(4))
    waiting.close()
    assert scheduler.stats.waiting == 0
    assert list(waiting) == []
    for stream in speaking:
        stream.close()
        assert list(stream) == []
    until(lambda: not scheduler.stats.active)
    assert scheduler.stats.cancelled == 4


def test_a_reader_that_does_not_read_pauses_its_own_request(tts: TTS) -> None:
    scheduler = Scheduler(tts, max_active=2)
    drawn = list[int]()
    slow = scheduler.submit(request(2, max_frames=400), most_buffered_s=0.5, progress=lambda p: drawn.append(p.frames))
    check(tts, 1, scheduler.submit(request(1)).whole())
    until(lambda: slow._job.paused)
    made = len(drawn)
    check(tts, 0, scheduler.submit(request(0)).whole())
    assert len(drawn) == made
    check(tts, 2, slow.whole(), 400)
    scheduler.close()


def test_the_highest_priority_is_begun_first(tts: TTS) -> None:
    scheduler, begun = Scheduler(tts, max_active=1), list[int]()
    first = scheduler.submit(request(0, max_frames=200))

    def tell(n: int) -> Any:
        return lambda progress: begun.append(n) if progress.frames == 1 else None

    others = [scheduler.submit(request(n), priority=p, progress=tell(n)) for n, p in ((1, 0), (2, 5), (3, 0), (4, 5))]
    for stream in (first, *others):
        stream.whole()
    scheduler.close()
    assert begun == [2, 4, 1, 3]


def test_the_end_of_a_block_ends_what_runs(tts: TTS) -> None:
    with Scheduler(tts) as scheduler:
        assert len(scheduler.submit(request(0, max_frames=2)).whole())
        running = scheduler.submit(request(1, max_frames=400))
    with pytest.raises(FishrtError, match="was closed"):
        running.whole()
    with pytest.raises(FishrtError, match="is closed"):
        scheduler.submit(request(2))


def test_a_request_that_waits_too_long_ends(tts: TTS) -> None:
    scheduler = Scheduler(tts, max_active=1)
    first = scheduler.submit(request(0, max_frames=400))
    late = scheduler.submit(request(1), timeout_s=0.0)
    with pytest.raises(TimeLimitError, match="longer than it may") as caught:
        late.whole()
    assert 1 <= pickle.loads(pickle.dumps(caught.value)).retry_s == caught.value.retry_s <= 30
    assert late.queued_s > 0
    first.close()
    scheduler.close()


def test_an_error_of_one_request_is_its_own(tts: TTS, scheduler: Scheduler) -> None:
    def stops(progress: Any) -> None:
        if progress.frames == 6:
            raise RuntimeError("the listener went home")

    broken, whole = scheduler.submit(request(2, max_frames=30), progress=stops), scheduler.submit(request(1))
    with pytest.raises(RuntimeError, match="went home"):
        list(broken)
    check(tts, 1, whole.whole())
    with pytest.raises(PromptError):
        scheduler.submit(Request("..."))
    assert scheduler.stats.failed == 1


def test_an_error_of_the_models_ends_all_that_speak_and_the_next_speak_again(
    tts: TTS, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, calls = tts.engines["slow_ar"], itertools.count()
    run = slow.run

    def fails(*args: Any, **options: Any) -> Any:
        if next(calls) == 12:
            raise GraphError("the device is gone")
        return run(*args, **options)

    monkeypatch.setattr(slow, "run", fails)
    streams = [scheduler.submit(request(n, max_frames=60)) for n in range(3)]
    for stream in streams:
        with pytest.raises((GraphError, UnfinishedError), match="the device is gone"):
            stream.whole()
    check(tts, 0, scheduler.submit(request(0)).whole())
    assert scheduler.fault is None


def test_a_closing_scheduler_lets_speech_end(tts: TTS) -> None:
    scheduler = Scheduler(tts, max_active=1)
    streams = [scheduler.submit(request(n)) for n in range(2)]
    threading.Thread(target=scheduler.close, args=(30.0,)).start()
    for n, stream in enumerate(streams):
        check(tts, n, stream.whole())
    with pytest.raises(FishrtError, match="closed"):
        scheduler.submit(request(0))


def test_a_closed_scheduler_says_so_to_its_readers(tts: TTS) -> None:
    scheduler = Scheduler(tts, max_active=1)
    streams = [scheduler.submit(request(n, max_frames=400)) for n in range(2)]
    next(streams[0])
    scheduler.close()
    for stream in streams:
        with pytest.raises(FishrtError, match="closed before all was spoken"):
            list(stream)


def test_a_tts_that_is_closed_lets_speech_end() -> None:
    with TTS.load(provider="cpu", threads=1) as tts:
        expected = tts.speak(request(0)).codes
        stream = tts.submit(request(0))
    np.testing.assert_array_equal(stream.whole().codes, expected)
    with pytest.raises(FishrtError, match="closed"):
        tts.submit("Hello!")


def test_streams_that_would_run_dry_go_before_prompts(tts: TTS, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = tts.opened()(2)
    first, second = (tts.job(request(n, max_frames=60), None, growing_chunks) for n in (2, 1))
    turns.add(first, 1.0)
    while not list(turns.turn()):
        pass
    turns.add(second, 1.0)
    first.heard_until = time.perf_counter() + 60
    turns._column_s = 120.0  # reading a prompt takes longer than what is left to hear
    held = 0
    while not second.row.begun:
        list(turns.turn())
        held += 1
    assert held == 2, "prompts wait, but not for ever"


def test_many_errors_come_in_their_turn(tts: TTS) -> None:
    speeches = tts.speak_many(["Hello!", "...", "Bye."], seed=1, max_frames=8)
    assert next(speeches).codes.shape[1] == 8
    with pytest.raises(PromptError):
        next(speeches)


def test_a_job_that_nobody_reads_gives_up_its_slot_and_goes_on_later(tts: TTS) -> None:
    scheduler, drawn = Scheduler(tts, max_active=1, known_bytes=0), list[int]()
    unread = scheduler.submit(request(2, max_frames=400), most_buffered_s=0.5, progress=lambda p: drawn.append(p.frames))
    until(lambda: unread._job.paused)
    for n in (0, 1):
        check(tts, n, scheduler.submit(request(n)).whole())
    assert len(drawn) < alone(tts, 2, 400).codes.shape[1]
    check(tts, 2, unread.whole(), 400)
    scheduler.close()


def test_any_number_of_readers_may_stall(tts: TTS) -> None:
    scheduler = Scheduler(tts, max_active=2, known_bytes=0)
    stalled = [scheduler.submit(request(2, max_frames=400), most_buffered_s=0.2) for _ in range(7)]
    until(lambda: all(stream._job.paused for stream in stalled))
    check(tts, 1, scheduler.submit(request(1)).whole())
    check(tts, 2, stalled[6].whole(), 400)
    scheduler.close()


def test_what_is_parked_is_bounded(tts: TTS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fishrt.speaking.scheduler.PARKED_BYTES", 1)
    scheduler = Scheduler(tts, max_active=1, known_bytes=0)
    stalled = [scheduler.submit(request(2, max_frames=400), most_buffered_s=0.2) for _ in range(3)]
    until(lambda: stalled[1]._job.paused)
    assert stalled[2].queued_s > 0
    assert not stalled[2]._job.begun, "one is parked, one has the slot, and one waits"
    scheduler.close()


def test_a_long_text_lets_others_speak_between_its_pieces(tts: TTS) -> None:
    scheduler, ended = Scheduler(tts, max_active=1, known_bytes=0), list[str]()
    long = Request(" ".join([TEXTS[2]] * 12), seed=1, max_frames=10)
    expected = tts.speak(long)
    assert len(expected.info.pieces) > 2

    def tell(progress: Progress) -> None:
        if progress.pieces > 2 and progress.piece + 1 == progress.pieces and "long" not in ended:
            ended.append("long")
        if progress.pieces < 3 and progress.frames == 1:
            ended.append("short")

    first, second = scheduler.submit(long, progress=tell), scheduler.submit(request(1), progress=tell)
    np.testing.assert_array_equal(first.whole().codes, expected.codes)
    check(tts, 1, second.whole())
    scheduler.close()
    assert ended == ["short", "long"]


def test_long_texts_share_a_slot(tts: TTS) -> None:
    """Each goes on from where it was, with what it had read."""
    scheduler = Scheduler(tts, max_active=1, known_bytes=0)
    texts = [Request(" ".join([TEXTS[2]] * 12), seed=n, max_frames=6) for n in range(3)]
    streams = [scheduler.submit(text, timeout_s=60.0, most_buffered_s=math.inf) for text in texts]
    for text, stream in zip(texts, streams, strict=True):
        np.testing.assert_array_equal(stream.whole().codes, tts.speak(text).codes)
    scheduler.close()


def test_what_was_said_with_the_same_seed_is_not_computed_again(tts: TTS, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, calls = Scheduler(tts), list[int]()
    first = scheduler.submit(request(1)).whole()
    run = tts.engines["slow_ar"].run
    monkeypatch.setattr(tts.engines["slow_ar"], "run", lambda *args: (calls.append(1), run(*args))[1])
    again = scheduler.submit(request(1)).whole()
    assert not calls
    np.testing.assert_array_equal(again.codes, first.codes)
    np.testing.assert_allclose(again.pcm, first.pcm, atol=1e-5)
    assert again.info.stop_reasons == first.info.stop_reasons
    for other in (replace(request(1), seed=None), request(2), replace(request(1), sampling=Sampling(temperature=0.5))):
        calls.clear()
        scheduler.submit(other).whole()
        assert calls
    scheduler.close()


def test_known_speech_is_bounded() -> None:
    known = KnownSpeech(3000)
    for n in range(10):
        known.keep(bytes([n]), [Spoken(np.zeros((1, 100), np.int32), "end")])
    assert [n for n in range(10) if known.find(bytes([n]))] == [8, 9]
    known.keep(b"large", [Spoken(np.zeros((1, 1000), np.int32), "end")])
    assert not known.find(b"large")
    known.keep(b"small", [Spoken(np.zeros((1, 250), np.int32), "end")])
    assert known.find(b"small")
    for n in range(100):
        known.keep(bytes([n]), [])
    assert sum(key in known._kept for key in map(bytes, zip(range(100), strict=True))) == 6  # nothing said takes room, too


@pytest.mark.parametrize("error", [SystemExit(3), StopIteration(), asyncio.CancelledError(), ZeroDivisionError()], ids=repr)
def test_any_error_of_progress_is_its_requests_own(tts: TTS, scheduler: Scheduler, error: BaseException) -> None:
    def progress(_: Progress) -> None:
        raise error

    broken, other = scheduler.submit(request(0), progress=progress), scheduler.submit(request(1))
    with pytest.raises(RuntimeError if isinstance(error, StopIteration) else type(error)):
        broken.whole()
    check(tts, 1, other.whole())
    check(tts, 2, scheduler.submit(request(2)).whole())


def test_progress_that_stops_an_iteration_does_not_cut_a_speech_off(tts: TTS) -> None:
    given = iter([None] * 5)
    with pytest.raises(RuntimeError, match="StopIteration"):
        tts.speak(request(0), progress=lambda _: next(given))


@pytest.mark.parametrize("options", [{"priority": "high"}, {"priority": 1.5}, {"timeout_s": "1"}, {"timeout_s": math.nan}])
def test_arguments_of_another_type_are_refused(tts: TTS, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        tts.submit(request(0), **options)
    check(tts, 1, tts.submit(request(1)).whole())


def test_dropped_streams_leave_room(tts: TTS, scheduler: Scheduler) -> None:
    """Of more than are active and parked: without an end, the last would never speak."""
    for n in range(12):
        stream = scheduler.submit(request(n, max_frames=None))
        next(stream)
        del stream
        until(lambda: scheduler.stats.active == 0)
    assert scheduler.stats.cancelled == 12
    check(tts, 1, scheduler.submit(request(1)).whole())


def test_a_refused_request_costs_nothing(tts: TTS, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    held = [scheduler.submit(request(n, max_frames=None)) for n in range(5)]
    monkeypatch.setattr(TTS, "job", lambda *_: pytest.fail("the text is read"))
    with pytest.raises(BusyError):
        scheduler.submit(request(5))
    assert (scheduler.stats.refused, len(held)) == (1, 5)


def test_two_waits_at_once_are_refused(scheduler: Scheduler) -> None:
    async def twice() -> None:
        stream = scheduler.submit(request(0))
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another task"):
            await anext(stream)
        assert (await first).sample_rate

    asyncio.run(twice())


@pytest.mark.parametrize("last", [5, OSError("the file has gone")], ids=repr)
def test_many_yields_what_was_asked_for_before_an_error_of_the_caller(tts: TTS, last: Any) -> None:
    def texts() -> Iterator[Any]:
        yield request(0)
        yield request(1)
        if isinstance(last, OSError):
            raise last
        yield last

    speeches = tts.speak_many(texts())
    check(tts, 0, next(speeches))
    check(tts, 1, next(speeches))
    with pytest.raises(OSError if isinstance(last, OSError) else ArgumentError):
        next(speeches)


def test_an_error_while_a_job_is_parked_ends_no_thread(tts: TTS, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(tts, max_active=1)
    idle = scheduler.submit(request(0, max_frames=None), most_buffered_s=0.01)
    next(idle)
    with monkeypatch.context() as patched:
        patched.setattr(Turns, "park", lambda *_: 1 // 0)
        refused = scheduler.submit(request(1))
        until(lambda: scheduler.stats.failed)
        with pytest.raises(ZeroDivisionError):
            idle.whole()
        check(tts, 1, refused.whole())
    scheduler.close()


def test_speed_changes_the_duration_and_not_the_codes(tts: TTS) -> None:
    normal, fast = tts.speak(request(2)), tts.speak(request(2), speed=1.5)
    np.testing.assert_array_equal(normal.codes, fast.codes)
    assert len(fast.pcm) == pytest.approx(len(normal.pcm) / 1.5, rel=0.02)
    streamed = np.concatenate([chunk.pcm for chunk in tts.stream(request(2), speed=1.5)])
    np.testing.assert_allclose(streamed, fast.pcm, atol=1e-3)


def test_a_refusal_counts_on_jobs_that_speak_for_long(tts: TTS) -> None:
    """What ended so far was short; those that have the slots now have had them for 16 s on average."""
    scheduler = Scheduler(tts, max_active=2, max_queue=0)
    scheduler.submit(request(0, max_frames=2)).whole()
    held = [scheduler.submit(Request(TEXTS[0] * 20, seed=n), most_buffered_s=0.1) for n in range(2)]
    until(lambda: scheduler.stats.active == 2)
    for entry, seconds in zip(scheduler._active.values(), (10, 22), strict=True):
        assert entry.begun is not None
        entry.begun -= seconds
    with pytest.raises(BusyError) as refused:
        scheduler.submit(request(1))
    assert refused.value.retry_s == 8
    for stream in held:
        stream.close()
    scheduler.close()
