"""Texts of export and inspect: time left, errors in words, a graph for some CPUs only."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fishrt.bundle.folder import describe_files
from fishrt.bundle.manifest import MANIFEST, Form, Parity, Rounding
from fishrt.cli import main
from fishrt_engines.engine import GraphSpec, TensorSpec
from helpers_text import bundle_folder

progress = sys.modules["fishrt.cli.base.progress"]


class Clock:
    """A replacement of the module `time`."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def test_progress_tells_the_time_left_from_where_the_work_began(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = progress.Reporter(quiet=False)
    clock.now += 10
    reporter.show("first", 0.5)  # a download that goes on: half was there
    clock.now += 30
    reporter.show("second", 0.75)
    clock.now += 30
    reporter.show("second", 0.76)
    reporter.done("ready")
    assert capsys.readouterr().err.splitlines() == [
        "[##########          ]  50% first",
        "[###############     ]  75% second, about 30 s left",
        "[###############     ]  76% second, for 30 s, about 55 s left",
        "ready",
    ]


def test_a_stage_that_stands_still_is_shown_again(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = progress.Reporter(quiet=False)
    reporter._shown_at = clock.now - 10
    reporter.show("tracing", 0.0)
    clock.now += reporter.STILL_S
    assert reporter._ticker is not None
    reporter._ticker.join(2.5)
    assert capsys.readouterr().err.splitlines()[:2] == [
        "[                    ]   0% tracing",
        "[                    ]   0% tracing, for 15 s",
    ]
    reporter.clear()
    reporter._ticker.join()
    assert not reporter._ticker.is_alive()


def test_progress_ends_before_an_error_is_told(clock: Clock) -> None:
    with click.Context(click.Command("x")).scope():
        reporter = progress.Reporter(quiet=False)
        reporter.show("working")
    assert reporter._closed.is_set()


def test_an_error_in_words() -> None:
    codes = GraphSpec("a.onnx", (), (TensorSpec("codes", "int64", ("batch",)),))
    audio = GraphSpec("a.onnx", (), (TensorSpec("audio", "float32", ("batch",)),))
    assert Parity(0.0, 1e-4, "cpu").summary(codes) == "0 codes differ"
    assert "unclear, by a margin of 2e-05 of 0.0001 allowed" in Parity(2e-5, 1e-4, "cpu").summary(codes)
    assert Parity(3.4e-5, 5e-4, "cpu").summary(audio) == "largest error 3.4e-05 of 0.0005 allowed"


def test_inspect_shows_the_decoder_in_8_bits(tmp_path: Path) -> None:
    bundle = bundle_folder(tmp_path / "bundle")
    (bundle.path / "codec_decode_int8.onnx").write_bytes(b"a graph")
    decode = bundle.manifest.graphs["codec_decode"]
    spec = replace(decode.spec, file="codec_decode_int8.onnx")
    form = Form("cpu", spec, needs=("vnni",), rounding=Rounding(21, 64, 34.8, 32.0))
    graphs = {**bundle.manifest.graphs, "codec_decode": replace(decode, forms=(form,))}
    manifest = replace(bundle.manifest, graphs=graphs, family="A family", recipe="int4").sealed(describe_files(bundle.path))
    (bundle.path / MANIFEST).write_text(manifest.to_json())
    shown = CliRunner().invoke(main, ["inspect", str(bundle.path)]).stdout
    for words in (
        "family        A family\nrecipe        int4\n",
        "  form for cpu with vnni: codec_decode_int8.onnx, 7 B\n    21 conv",
    ):
        assert words in shown
