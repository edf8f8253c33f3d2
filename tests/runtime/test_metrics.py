from __future__ import annotations

import pytest

from fishrt import metrics
from fishrt.metrics import Summary


def test_rtf_is_compute_over_audio():
    assert metrics.rtf(1.0, 4.0) == 0.25


def test_speed_up_is_the_peers_time_over_ours():
    assert metrics.speed_up(0.02, 0.12) == pytest.approx(6)


def test_a_frame_reads_the_slow_ar_once_and_the_fast_ar_in_each_step():
    assert metrics.frame_bytes(slow=1000, fast=10, fast_steps=7) == 1070


def test_bandwidth_share_is_bytes_a_second_over_the_limit():
    assert metrics.bandwidth_share(bytes_read=5e9, seconds=0.5, limit=20e9) == 0.5
    assert metrics.per_second(30, 2) == 15


def test_summary_is_in_milliseconds():
    summary = Summary.of([0.001 * n for n in range(1, 102)])
    assert summary == Summary(median_ms=51.0, p95_ms=96.0, count=101)
    assert summary.median_s == 0.051


def test_nothing_has_no_summary():
    with pytest.raises(ValueError, match="nothing was measured"):
        Summary.of([])
