from __future__ import annotations

import io
import json
from pathlib import Path

import click
import pytest
import soundfile

import helpers_cli
from fishrt.cli import main
from fishrt.errors import FishrtError, ProviderError
from fishrt.sampling import Sampling
from helpers_cli import RATE, files, refused, run

fake = helpers_cli.fake
recording = helpers_cli.recording


def test_speak_writes_speech_wav(fake):
    result = run("speak", "Hello.")
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert "speech.wav: 25 frames, 1.00 s, RTF 0.50, stopped by end, seed 99" in result.stderr
    assert files() == ["speech.wav"]
    assert soundfile.info("speech.wav").frames == RATE
    assert fake.asked == {
        "text": "Hello.",
        "voice": None,
        "sampling": Sampling(1.0, 0.9, 30),
        "seed": None,
        "max_frames": None,
        "system": None,
        "upstream_compat": False,
    }
    assert fake.loads == [(None, {"provider": "auto", "threads": None})]


def test_speak_passes_every_option_on(fake, tmp_path):
    options = "--temperature 0.5 --top-p 0.6 --top-k 7 --seed 3 --max-frames 9 --upstream-compat --provider cpu --threads 2 -q"
    result = run("speak", "Hello.", "-o", "a.flac", "--system", "Be kind.", "--bundle", tmp_path / "b", *options.split())
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert soundfile.info("a.flac").format == "FLAC"
    assert fake.asked["sampling"] == Sampling(0.5, 0.6, 7)
    assert {k: fake.asked[k] for k in ("seed", "max_frames", "system", "upstream_compat")} == {
        "seed": 3,
        "max_frames": 9,
        "system": "Be kind.",
        "upstream_compat": True,
    }
    assert fake.loads == [(tmp_path / "b", {"provider": "cpu", "threads": 2})]


@pytest.mark.parametrize("how", ["argument", "dash", "piped", "file", "file dash"])
def test_where_text_comes_from(fake, how):
    Path("text.txt").write_text("\ufeffGrüße!\n", encoding="utf-8")
    arguments = {"argument": ["Grüße!\n"], "dash": ["-"], "piped": [], "file": ["-f", "text.txt"], "file dash": ["-f", "-"]}[how]
    result = run("speak", *arguments, stdin="Grüße!\n" if how in ("dash", "piped", "file dash") else "not this")
    assert result.exit_code == 0, result.output
    assert fake.asked["text"] == "Grüße!\n"


def test_text_and_file_are_one_too_many(fake):
    refused(run("speak", "Hi.", "-f", "x.txt"), "not both")


@pytest.mark.parametrize("text", ["", " \n", "...", "\x07"])
def test_nothing_to_speak_loads_no_model(fake, text):
    refused(run("speak", stdin=text), "nothing to speak", "hint: ")
    assert fake.loads == []
    assert files() == []


def test_text_that_is_not_utf8(fake):
    Path("text.txt").write_bytes(b"caf\xe9 noir")
    refused(run("speak", "-f", "text.txt"), "text.txt is not UTF-8", "byte 3")
    refused(run("speak", stdin=b"caf\xe9 noir"), "standard input is not UTF-8")
    refused(run("speak", "caf\udce9 noir"), "not valid UTF-8")
    assert fake.loads == []


def test_a_missing_text_file(fake):
    refused(run("speak", "-f", "none.txt"), "none.txt cannot be read: No such file")


@pytest.mark.parametrize(
    ("output", "word"), [("no/folder/a.wav", "no folder"), ("a.xyz", ".xyz"), (".", "."), ("taken.wav", "folder")]
)
def test_unwritable_output_loads_no_model(fake, output, word):
    Path("taken.wav").mkdir()
    refused(run("speak", "Hi.", "-o", output), word)
    assert fake.loads == []
    assert files() == ["taken.wav"]


def test_standard_output(fake):
    result = run("speak", "Hi.", "-o", "-", "--json")
    assert result.exit_code == 0
    pcm, rate = soundfile.read(io.BytesIO(result.stdout_bytes))
    assert (len(pcm), rate) == (RATE, RATE)
    assert json.loads(result.stderr.splitlines()[-1])["output"] == "-"
    assert files() == []


def test_json(fake):
    result = run("speak", "Hi.", "--json", "--seed", "5", "--voice", "otto")
    data = json.loads(result.stdout)
    assert data["ok"] is True
    assert (data["command"], data["output"], data["seed"], data["frames"], data["rtf"]) == ("speak", "speech.wav", 5, 25, 0.5)
    assert data["sampling"] == {"temperature": 1.0, "top_p": 0.9, "top_k": 30}
    assert data["stop_reasons"] == ["end"]
    assert data["voices"] == ["otto"]
    failed = run("speak", "...", "--json")
    refused(failed, "nothing to speak")
    assert json.loads(failed.stdout)["error"]["kind"] == "PromptError"


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("--temperature", "0", "temperature is 0"),
        ("--top-p", "1.5", "top_p is 1.5"),
        ("--top-k", "0", "top_k is 0"),
        ("--seed", "-1", "--seed"),
        ("--max-frames", "0", "--max-frames"),
        ("--threads", "0", "--threads"),
    ],
)
def test_options_out_of_range(fake, option, value, word):
    refused(run("speak", "Hi.", option, value), word)
    assert fake.asked is None
    assert files() == []


def test_errors_become_lines(fake):
    fake.failure = ProviderError("no such provider", hint="install it")
    result = run("speak", "Hi.")
    assert result.exit_code == 2
    assert result.stderr.endswith("error: no such provider\nhint: install it\n")
    assert files() == []
    for place in (["--debug", "speak", "Hi."], ["speak", "Hi.", "--debug"]):
        result = run(*place)
        assert result.exit_code == 2
        assert "Traceback" in result.stderr
        assert "hint: install it" in result.stderr


def test_interruption_leaves_nothing(fake):
    Path("a.wav").write_bytes(b"old")
    fake.failure = KeyboardInterrupt()
    result = run("speak", "Hi.", "-o", "a.wav")
    assert result.exit_code == 130
    assert "Traceback" not in result.stderr
    assert files() == ["a.wav"]
    assert Path("a.wav").read_bytes() == b"old"


def commands(command: click.Command = main, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    inner = command.commands.items() if isinstance(command, click.Group) else ()
    return [(path, command), *(found for name, c in inner for found in commands(c, (*path, name)))]


@pytest.mark.parametrize(("path", "command"), commands(), ids=lambda x: " ".join(x) if isinstance(x, tuple) else "")
def test_every_command_and_option_has_help(path, command):
    result = run(*path, "--help")
    assert result.exit_code == 0
    assert command.help
    for option in command.params:
        assert isinstance(option, click.Argument) or option.help, option.name


def test_mistyped_options_are_not_spoken(fake):
    refused(run("speak", "Hi.", "--temprature", "1"), "--temprature")
    assert fake.loads == []


def test_unknown_failures_are_not_hidden(fake):
    fake.failure = ValueError("a bug")
    assert isinstance(run("speak", "Hi.").exception, ValueError)
    fake.failure = FishrtError("known")
    refused(run("speak", "Hi."), "known")
