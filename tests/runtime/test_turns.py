"""Turns of jobs that wait for their first sound: prompts are read together, and first chunks are short and go before others."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from fishrt import TTS, Request
from fishrt.kinds.columns import ColumnJob, ColumnTurns
from fishrt.speaking.job import ChunkSizes
from fishrt.speaking.stream import chunk_sizes, growing_chunks, whole_chunks

TEXT = "The birch canoe slid on the smooth planks."


@pytest.fixture(scope="module")
def tts() -> Iterator[TTS]:
    """The embedded voice on one thread; its voice is known."""
    with TTS.load(provider="cpu", threads=1) as loaded:
        loaded.speak(TEXT, max_frames=1)
        yield loaded


def turns_of(tts: TTS, slots: int) -> ColumnTurns:
    made = tts.opened()(slots)
    assert isinstance(made, ColumnTurns)
    return made


def add(tts: TTS, turns: ColumnTurns, count: int, sizes: ChunkSizes = growing_chunks) -> list[ColumnJob]:
    """Add jobs that no end token ends early."""
    made = []
    for n in range(count):
        job = tts.job(Request(TEXT, seed=n, max_frames=40), None, sizes)
        assert isinstance(job, ColumnJob)
        turns.add(job, 1.0)
        made.append(job)
    return made


def turn(turns: ColumnTurns) -> list[ColumnJob]:
    """Take a turn. Return the jobs that have a new chunk, in order."""
    return [job for job in turns.turn() if job.pop() is not None]


def chunks(job: ColumnJob) -> list[int]:
    """Return the frames of the chunks so far."""
    return [codes.shape[1] for codes in job._given]


def test_prompts_are_read_before_the_next_step(tts: TTS) -> None:
    turns = turns_of(tts, 6)
    jobs = add(tts, turns, 6)
    turn(turns)
    assert [job.row.begun for job in jobs] == [True] * 6
    assert turns.rows == 6


@pytest.mark.parametrize(("fit", "begun"), [(1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3, 4])])
def test_a_turn_reads_no_more_than_a_part(tts: TTS, fit: int, begun: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    turns = turns_of(tts, 4)
    jobs = add(tts, turns, 4)
    start, end = turns._batch.next_part(jobs[0].row)
    assert start == jobs[0].row.head, "the voice is known"
    monkeypatch.setattr("fishrt.kinds.columns.PART", fit * (end - start) + 1)
    monkeypatch.setattr("fishrt.kinds.columns.MOST_HELD", 0)  # on a busy machine streams run dry, and prompts would wait
    found = []
    for _ in begun:
        turn(turns)
        found.append(sum(job.row.begun for job in jobs))
    assert found == begun


def test_first_chunks_are_halved_where_several_wait(tts: TTS) -> None:
    alone = turns_of(tts, 3)
    (job,) = add(tts, alone, 1)
    while len(chunks(job)) < 5:
        turn(alone)
    assert chunks(job) == [4, 4, 4, 4, 8]
    for sizes, expected in ((growing_chunks, [2, 2, 2, 2, 4]), (chunk_sizes("quality"), [8, 8]), (whole_chunks, [16, 16])):
        turns = turns_of(tts, 3)
        jobs = add(tts, turns, 2, sizes)
        while len(chunks(jobs[1])) < len(expected):
            turn(turns)
        assert [chunks(job) for job in jobs] == [expected] * 2


def test_one_that_comes_later_changes_no_chunk_of_those_that_speak(tts: TTS) -> None:
    turns = turns_of(tts, 3)
    (first,) = add(tts, turns, 1)
    while len(chunks(first)) < 1:
        turn(turns)
    (second,) = add(tts, turns, 1)
    while len(chunks(first)) < 4:
        turn(turns)
    assert chunks(first) == [4] * 4
    assert chunks(second)[:2] == [4, 4]


def test_one_that_has_drawn_more_than_half_a_chunk_speaks_at_once(tts: TTS) -> None:
    turns = turns_of(tts, 3)
    (first,) = add(tts, turns, 1)
    while first.frames_wanted > 1:
        assert not turn(turns)
    (second,) = add(tts, turns, 1)
    assert first in turn(turns)
    assert chunks(first) == [3]
    while len(chunks(second)) < 2:
        turn(turns)
    assert chunks(second)[:2] == [2, 2]


def test_chunks_are_decoded_in_the_order_of_need(tts: TTS) -> None:
    """First the one that nobody has heard yet, then those that are first to run dry."""
    turns = turns_of(tts, 4)
    jobs = add(tts, turns, 4)
    while not all(chunks(job) for job in jobs):
        turn(turns)
    now, lasts = time.perf_counter(), (30.0, None, 10.0, 20.0)
    for job, seconds in zip(jobs, lasts, strict=True):
        job.heard_until = None if seconds is None else now + seconds
    order: Sequence[Any] = ()
    while not order:
        order = turn(turns)
    assert order == [jobs[1], jobs[2], jobs[3], jobs[0]]
