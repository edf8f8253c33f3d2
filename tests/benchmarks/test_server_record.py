"""The record of a server under load: what clients hear, and the ratios of eight clients to one."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

import server
import server_clients


def test_a_reply_is_played_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second part comes 0.5 s too late, the third early."""
    clock = iter([1.0, 3.5, 3.6, 4.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    heard = server_clients.listen(iter([2.0, 1.0, 1.0]), 0.25)
    assert heard == {"first_s": 0.75, "total_s": 3.75, "audio_s": 4.0, "dry_s": 0.5}


def test_clients_speak_at_the_same_time() -> None:
    running, most = [], list[int]()

    def speak(text: str, seed: int) -> Iterator[float]:
        running.append(seed)
        for _ in range(200):  # until all have begun
            most.append(len(running))
            time.sleep(0.005)
            if max(most) == 3:
                break
        running.remove(seed)
        yield 1.0

    found = server_clients.run(speak, 3, 2)
    assert len(found["requests"]) == 6
    assert max(most) == 3


def test_figures() -> None:
    requests = [{"first_s": n / 10, "audio_s": 2.0, "dry_s": 0.1 * (n == 3), "total_s": 1.0} for n in (1, 2, 3)]
    found = server.figures({"requests": requests, "wall_s": 3.0})
    assert found["aggregate"] == 2.0
    assert found["first_p50_s"] == 0.2
    assert found["slowest_first"] == pytest.approx(1.5)
    assert found["dry_streams"] == pytest.approx(1 / 3)
    one, eight = dict(found, aggregate=2.0, first_p95_s=0.1), dict(found, aggregate=5.0, first_p95_s=0.4)
    ratios = {"aggregate": 2.5, "first_p95": 4.0, "slowest_first": found["slowest_first"]}
    assert server.goals({"1": one, "8": eight}) == {**ratios, "dry_streams": one["dry_streams"]}
    assert server.goals({"1": dict(one, aggregate=0.9), "8": eight})["aggregate"] == pytest.approx(5.0 / 0.9, abs=1e-3)
    assert "dry_streams" not in server.goals({"1": dict(one, aggregate=0.9), "8": eight})
