"""Lines of progress: a bar, per cent, and the time left. The clock is simulated."""

from __future__ import annotations

import io
import sys

import click
import pytest

from fishrt.cli.base import progress
from fishrt.cli.base.progress import Reporter, duration, share_of_pieces


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_every_few_seconds_there_is_a_line(clock, capsys):
    reporter = Reporter(quiet=False)
    for _ in range(20):
        clock[0] += 1
        reporter.show("reading", (clock[0] - 100) / 80)
    reporter.done("read")
    assert capsys.readouterr().err.splitlines() == [
        "[#                   ]   6% reading, for 4 s",
        "[##                  ]  12% reading, for 9 s, about 1 min 10 s left",
        "[####                ]  19% reading, for 14 s, about 1 min 5 s left",
        "[#####               ]  25% reading, for 19 s, about 1 min 0 s left",
        "read",
    ]


def test_progress_tells_the_time_left_from_where_the_work_began(clock, capsys):
    reporter = Reporter(quiet=False)
    clock[0] += 10
    reporter.show("first", 0.5)  # a download that goes on: half was there
    clock[0] += 30
    reporter.show("second", 0.75)
    clock[0] += 30
    reporter.show("second", 0.76)
    reporter.done("ready")
    assert capsys.readouterr().err.splitlines() == [
        "[##########          ]  50% first",
        "[###############     ]  75% second, about 30 s left",
        "[###############     ]  76% second, for 30 s, about 55 s left",
        "ready",
    ]


def test_a_stage_that_stands_still_is_shown_again(clock, capsys):
    reporter = Reporter(quiet=False)
    reporter._shown_at = clock[0] - 10
    reporter.show("tracing", 0.0)
    clock[0] += reporter.STILL_S
    assert reporter._ticker is not None
    reporter._ticker.join(2.5)
    assert capsys.readouterr().err.splitlines()[:2] == [
        "[                    ]   0% tracing",
        "[                    ]   0% tracing, for 15 s",
    ]
    reporter.clear()
    reporter._ticker.join()
    assert not reporter._ticker.is_alive()


def test_progress_ends_before_an_error_is_told(clock):
    with click.Context(click.Command("x")).scope():
        reporter = Reporter(quiet=False)
        reporter.show("working")
    assert reporter._closed.is_set()


def test_without_a_part_there_is_no_bar(clock, capsys):
    reporter = Reporter(quiet=False)
    for text, part in (("reading", None), ("hashing", 0.0)):
        clock[0] += 6
        reporter.show(text, part)
    reporter.clear()
    assert capsys.readouterr().err.splitlines() == ["reading", "[                    ]   0% hashing"]


def test_a_terminal_has_one_line_that_the_result_replaces(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    reporter = Reporter(quiet=False)
    for part in (0.5, 0.75):
        clock[0] += 1
        reporter.show("reading", part)
    reporter.done("read")
    half, more, rest = sys.stderr.getvalue().split("\r\x1b[K", 3)[1:]
    assert half == "[##########          ]  50% reading"
    assert more == "[###############     ]  75% reading, about 1 s left"
    assert rest.removeprefix("\r\x1b[K") == "read\n"


def test_quiet_means_silence(clock, capsys):
    reporter = Reporter(quiet=True)
    clock[0] += 100
    reporter.show("reading", 0.5)
    reporter.done("read")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_share_of_a_speech_is_known_after_its_first_piece():
    share = share_of_pieces()
    assert [share(0, 4, 10), share(0, 4, 40)] == [None, None]
    assert [share(1, 4, 41), share(1, 4, 60)] == [(1 + 1 / 40) / 4, 1.5 / 4]
    assert share(1, 4, 100) == 0.5  # longer than those before: not yet the next
    assert share(2, 4, 125) == (2 + 25 / 50) / 4
