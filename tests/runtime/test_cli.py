from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

import fishrt
import helpers_cli
from fishrt.audio.encoders import pcm16
from fishrt.cli import main
from fishrt.cli.base.commands import Commands
from fishrt.errors import FishrtError, GraphError, ProviderError, UnfinishedError
from fishrt.language_model.sampling import Sampling
from helpers_cli import RATE, files, refused, run, tone

fake = helpers_cli.fake
recording = helpers_cli.recording


def test_a_file_that_is_replaced_is_told(fake, recording):
    for command, name in (
        (("speak", "Hello."), "speech.wav"),
        (("speak", "Hello.", "--stream"), "speech.wav"),
        (("speak", "Hello.", "-o", "a.flac"), "a.flac"),
        (("codec", "encode", recording), "codes.npy"),
        (("codec", "decode", "codes.npy", "-o", "b.wav"), "b.wav"),
    ):
        Path(name).unlink(missing_ok=True)
        assert [run(*command).stderr.split(" (")[0] for _ in range(2)] == [f"Wrote {name}", f"Replaced {name}"]


def test_speak_writes_speech_wav(fake):
    result = run("speak", "Hello.")
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert result.stderr == "Wrote speech.wav (1.0 s, voice minna, seed 99, 2.0 × faster than real time)\n"
    assert files() == ["speech.wav"]
    assert soundfile.info("speech.wav").frames == RATE
    assert fake.asked == {
        "text": "Hello.",
        "voice": None,
        "sampling": Sampling(),
        "seed": None,
        "max_frames": None,
        "system": None,
        "volume": 1.0,
        "speed": 1.0,
        "upstream_compat": False,
        "denoising": None,
    }
    assert fake.loads == [(None, {"provider": "auto", "threads": None})]


def test_speak_passes_every_option_on(fake, tmp_path):
    options = "--temperature 0.5 --top-p 0.6 --top-k 7 --seed 3 --max-frames 9 --upstream-compat --provider cpu --threads 2 -q"
    options += " --volume 0.5"
    result = run("speak", "Hello.", "-o", "a.flac", "--system", "Be kind.", "--bundle", tmp_path / "b", *options.split())
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert soundfile.info("a.flac").format == "FLAC"
    assert fake.asked["sampling"] == Sampling(0.5, 0.6, 7)
    asked = [fake.asked[name] for name in ("seed", "max_frames", "system", "upstream_compat", "volume")]
    assert asked == [3, 9, "Be kind.", True, 0.5]
    assert fake.loads == [(tmp_path / "b", {"provider": "cpu", "threads": 2})]


def test_a_repetition_penalty_is_for_models_that_have_one(fake):
    refused(run("speak", "Hello.", "--repetition-penalty", "1.3"), "no repetition penalty")
    assert fake.asked["sampling"] == Sampling(repetition_penalty=1.3)


@pytest.mark.parametrize("how", ["argument", "dash", "piped", "file", "file dash"])
def test_where_text_comes_from(fake, how):
    Path("text.txt").write_text("\ufeffGrüße!\n", encoding="utf-8")
    arguments = {"argument": ["Grüße!\n"], "dash": ["-"], "piped": [], "file": ["-f", "text.txt"], "file dash": ["-f", "-"]}[how]
    result = run("speak", *arguments, stdin="Grüße!\n" if how in ("dash", "piped", "file dash") else "not this")
    assert result.exit_code == 0, result.output
    assert fake.asked["text"] == "Grüße!\n"


def test_words_are_joined(fake):
    assert run("speak", "hello", "-o", "a.wav", "big", "world").exit_code == 0
    assert fake.asked["text"] == "hello big world"


def test_standard_output(fake):
    result = run("speak", "Hi.", "-o", "-", "--json")
    assert result.exit_code == 0
    pcm, rate = soundfile.read(io.BytesIO(result.stdout_bytes))
    assert (len(pcm), rate) == (RATE, RATE)
    assert json.loads(result.stderr.splitlines()[-1])["output"] == "-"
    assert files() == []


@pytest.mark.parametrize("options", [[], ["--stream"]])
def test_bare_samples_on_standard_output(fake, options):
    result = run("speak", "Hi.", "-o", "-", "--format", "pcm", *options)
    assert result.exit_code == 0, result.stderr
    assert result.stdout_bytes == pcm16(tone(1.0)).astype("<i2").tobytes()
    assert "Wrote to standard output" in result.stderr


def test_format_of_files(fake):
    for options, name, kind in ((["--format", "flac"], "speech.flac", "FLAC"), (["-o", "out", "--format", "ogg"], "out", "OGG")):
        assert run("speak", "Hi.", *options).exit_code == 0
        assert soundfile.info(name).format == kind


def test_a_limit_in_seconds(fake):
    codec = fake.bundle.manifest.codec
    for seconds, frames in (("0.5", int(0.5 * codec.frame_rate)), ("0.001", 1), ("100000", codec.max_frames)):
        assert run("speak", "Hi.", "--max-seconds", seconds).exit_code == 0
        assert fake.asked["max_frames"] == frames


# --- lines ---------------------------------------------------------------------------------------------------------------------


LINES = "One.\n\n...\nTwo.\r\nThree."
"""Lines 2 and 3 cannot be spoken: one is empty, the other is nothing but dots."""


def test_each_line_becomes_a_file(fake):
    result = run("speak", "--lines", "-f", "-", "-o", "out", "--seed", "4", "--json", stdin=LINES)
    assert result.exit_code == 2
    assert sorted(p.name for p in Path("out").iterdir()) == ["0001.wav", "0004.wav", "0005.wav"]
    assert fake.texts == ["One.", "Two.", "Three."]
    data = json.loads(result.stdout)
    assert (data["ok"], data["error"]["message"]) == (False, "1 of 4 lines were not spoken")
    assert [(entry["line"], entry["output"]) for entry in data["files"]] == [
        (1, "out/0001.wav"),
        (3, None),
        (4, "out/0004.wav"),
        (5, "out/0005.wav"),
    ]
    assert [warning.split(":")[0] for warning in data["warnings"]] == ["line 3 was not spoken"]
    assert {entry.get("seed") for entry in data["files"]} == {4, None}
    good = run("speak", "--lines", "-f", "-", "-o", "out", "--format", "flac", stdin="One.\nTwo.\n")
    assert (good.exit_code, good.stderr) == (0, "Wrote 2 of 2 lines to out (2.0 s of speech)\n")
    assert soundfile.info("out/0002.flac").frames == RATE


def test_a_fault_of_one_line_does_not_stop_the_others(fake):
    fake.failures = {f"Bad {n}.": FishrtError("the model ended") for n in range(9)}
    lines = "".join(f"Bad {n}.\nGood {n}.\n" for n in range(9))
    result = run("speak", "--lines", "-o", "out", stdin=lines)
    assert result.exit_code == 2
    assert len(list(Path("out").iterdir())) == 9
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert warnings[-1] == "warning: and 4 more such warnings; --json lists them all"
    assert len(warnings) == 6
    assert "Wrote 9 of 18 lines" in result.stderr


def test_a_line_that_breaks_off_does_not_stop_the_others(fake):
    spoken = fake.speak("One.", voice=None, seed=1, sampling=Sampling())
    fake.failures = {"One.": UnfinishedError(GraphError("the graph broke"), spoken)}
    failed = run("speak", "--lines", "-o", "out", stdin="One.\nTwo.")
    refused(failed, "line 1 was not spoken to its end: the graph broke", "out/0001.wav holds the 1.0 s", "1 of 2 lines")
    assert sorted(p.name for p in Path("out").iterdir()) == ["0001.wav", "0002.wav"]


def test_a_fault_of_all_lines_ends_them(fake):
    fake.failures = {"Two.": ProviderError("no such provider")}
    failed = run("speak", "--lines", "-o", "out", "--json", stdin="One.\nTwo.\nThree.")
    refused(failed, "line 2: no such provider")
    assert [entry["output"] for entry in json.loads(failed.stdout)["files"]] == ["out/0001.wav"]


# --- playing -------------------------------------------------------------------------------------------------------------------


class FakeSoundCard:
    """The part of sounddevice that is used."""

    class PortAudioError(Exception):
        pass

    def __init__(self):
        self.heard, self.obstacle, self.unplugged_after = [], None, None

    def check_output_settings(self, **_):
        if self.obstacle:
            raise self.PortAudioError(self.obstacle)

    def OutputStream(self, *, samplerate, channels, dtype):  # noqa: N802
        assert (samplerate, channels, dtype) == (RATE, 1, "float32")
        return contextlib.nullcontext(SimpleNamespace(write=self.write))

    def write(self, pcm):
        if len(self.heard) == self.unplugged_after:
            raise self.PortAudioError("Device unavailable")
        self.heard.append(pcm)


@pytest.fixture
def card(monkeypatch):
    made = FakeSoundCard()
    monkeypatch.setitem(sys.modules, "sounddevice", made)
    return made


def test_speech_is_played_as_it_comes(fake, card):
    result = run("speak", "Hi.", "--play")
    assert result.exit_code == 0, result.output
    assert result.stderr == "Played (1.0 s, voice minna, seed 99, 2.0 × faster than real time)\n"
    np.testing.assert_array_equal(np.concatenate(card.heard), tone(1.0))
    assert len(card.heard) == 4
    assert files() == []


def test_speech_is_played_and_written(fake, card):
    for options in (["-o", "a.flac"], ["-o", "a.wav", "--stream"]):
        assert "Played and wrote a." in run("speak", "Hi.", "--play", *options).stderr
        assert "Played and replaced a." in run("speak", "Hi.", "--play", *options).stderr
    assert [soundfile.info(name).frames for name in files()] == [RATE, RATE]


def test_a_device_that_fails_does_not_cost_the_file(fake, card):
    card.unplugged_after = 2
    result = run("speak", "Hi.", "--play", "-o", "a.wav")
    assert result.exit_code == 0
    assert "warning: the rest is not played: Device unavailable\n" in result.stderr
    assert soundfile.info("a.wav").frames == RATE
    card.heard.clear()
    refused(run("speak", "Hi.", "--play"), "cannot play: Device unavailable")


def test_a_machine_that_cannot_play_is_told_before_the_work(fake, card, monkeypatch):
    card.obstacle = "Error querying device -1"
    refused(run("speak", "Hi.", "--play"), "there is no device to play on: Error querying device -1")
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    refused(run("speak", "Hi.", "--play"), "sounddevice", 'pip install "fishrt[play]"')
    assert fake.loads == []


def test_json(fake):
    result = run("speak", "Hi.", "--json", "--seed", "5", "--voice", "otto")
    data = json.loads(result.stdout)
    assert data["ok"] is True
    assert (data["command"], data["output"], data["seed"], data["frames"], data["rtf"]) == ("speak", "speech.wav", 5, 25, 0.5)
    assert data["sampling"] == {"temperature": 1.0, "top_p": 0.9, "top_k": 30, "repetition_penalty": None}
    assert data["pieces"] == [{"text": "Hi.", "frames": 25, "stop_reason": "end"}]
    assert data["warnings"] == []
    assert data["voices"] == ["otto"]
    assert result.stderr == ""
    assert json.loads(run("speak", "Hi.", "--json").stdout)["voices"] == ["minna"]
    failed = run("speak", "...", "--json")
    refused(failed, "nothing to speak")
    assert json.loads(failed.stdout)["error"]["kind"] == "PromptError"


MISTAKES = {
    "speak Hi. -f x.txt": "not both",
    "speak ''": "nothing to speak in the text: it is empty|hint: ",
    "speak ...": "neither a letter nor a digit",
    "speak \udce9": "not valid UTF-8",
    "speak -f latin.txt": "latin.txt is not UTF-8|byte 3",
    "speak": "standard input is not UTF-8",
    "speak -f none.txt": "none.txt cannot be read: No such file",
    "speak Hi. -o no/folder/a.wav": "no folder",
    "speak Hi. -o a.xyz": ".xyz",
    "speak Hi. -o a": "no ending",
    "speak Hi. -o .": "no ending",
    "speak Hi. -o folder.wav": "is a folder",
    "speak Hi. -o a.mp3 --format wav": "its ending says mp3",
    "speak Hi. --format amr": "unknown format 'amr'|opus",
    "speak Hi. -o a.ogg --stream": "no streams of ogg",
    "speak Hi. -o no/such/a.wav --stream": "no/such",
    "speak Hi. --lines": "-o DIR",
    "speak Hi. --lines -o -": "-o DIR",
    "speak Hi. --lines -o out --stream": "-o DIR",
    "speak Hi. --lines -o out --play": "-o DIR",
    "speak Hi. --lines -o bad.npy": "bad.npy: it is not a folder",
    "speak Hi. --lines -o no/out": "no folder",
    "speak '\n \n' --lines -o out": "nothing to speak",
    "speak Hi. --temprature 1": "--temprature",
    "speak Hi. --temperature -1": "--temperature|-1.0 is not in the range 0<=x<2",
    "speak Hi. --temperature 2": "--temperature|2.0 is not in the range 0<=x<2",
    "speak Hi. --temperature hot": "--temperature|'hot' is not a number",
    "speak Hi. --temperature nan": "--temperature|'nan' is not a number",
    "speak Hi. --top-p 1.5": "--top-p|1.5 is not in the range 0<x<=1",
    "speak Hi. --top-k 0": "--top-k|0 is not in the range x>=1",
    "speak Hi. --top-k 7.5": "--top-k|'7.5' is not a whole number",
    "speak Hi. --repetition-penalty 2.1": "--repetition-penalty|2.1 is not in the range 0<x<=2",
    "speak Hi. --seed -1": "--seed|-1 is not in the range x>=0",
    "speak Hi. --seed abc": "--seed|'abc' is not a whole number",
    "speak Hi. --max-frames 0": "--max-frames|0 is not in the range x>=1",
    "speak Hi. --max-seconds 0": "--max-seconds|0.0 is not in the range x>0",
    "speak Hi. --max-seconds 1 --max-frames 9": "the same limit",
    "speak Hi. --volume 0": "--volume",
    "speak Hi. --volume 11": "--volume",
    "speak Hi. --threads 0": "--threads",
    "speak Hi. --reference x.wav": "1 --reference, but 0 --reference-text",
    "speak Hi. --reference-text x": "0 --reference, but 1 --reference-text",
    "voice add a/b --audio RECORDING --text x": "cannot be the name",
    "voice add a --audio latin.txt --text x": "latin.txt is not audio",
    "codec encode RECORDING -o no/codes.npy": "no folder",
    "codec encode RECORDING -o folder.npy": "is a folder",
    "codec encode RECORDING -o codes.txt": "cannot write codes.txt|.npy",
    "codec encode RECORDING -o codes": "cannot write codes|.npy",
    "codec encode codes.npy": "codes.npy is an .npy array, not audio|codec decode",
    "codec encode bad.npy": "bad.npy",
    "codec decode bad.npy": "bad.npy",
    "codec decode RECORDING": "me.wav is audio, not codes|fishrt codec encode",
    "codec decode none.npy": "none.npy",
    "codec decode codes.npy -o a.txt": ".txt",
    "export ckpt out --precision int5": "'int5' is not one of 'fp32', 'fp16', 'int8', 'int8-rows', 'int4'",
    "export ckpt out --keep slow_ar.output": "'slow_ar.output' is not NAME=PRECISION",
    "export ckpt out --keep =int8": "'=int8' is not NAME=PRECISION",
    "export ckpt out --keep slow_ar.output=int5": "unknown precision 'int5'",
    "export ckpt out --lora a.ckpt": "--lora needs --lora-alpha",
    "export ckpt out --lora a.ckpt --lora-rank 8": "--lora needs --lora-alpha",
    "export ckpt out --lora-alpha 16": "--lora-alpha needs --lora",
    "export ckpt out --lora-rank 8": "--lora-rank needs --lora",
    "export ckpt out --revision v1": "--revision is for OWNER/NAME",
    "inspect nowhere": "nowhere does not exist",
    "help voice sing": "there is no command 'voice sing'",
    "help speak loud": "there is no command 'speak loud'",
}
"""Command lines, with the words of their errors."""


@pytest.mark.parametrize(("line", "says"), MISTAKES.items())
def test_a_mistake_is_told_before_the_work(fake, recording, line, says):
    for name in ("folder.wav", "folder.npy"):
        Path(name).mkdir()
    Path("latin.txt").write_bytes(b"caf\xe9 noir")
    Path("bad.npy").write_bytes(b"x")
    np.save("codes.npy", np.ones((4, 3), int))
    before = files()
    told = refused(run(*shlex.split(line.replace("RECORDING", recording)), stdin=b"caf\xe9 noir"), *says.split("|"))
    assert "allow_pickle" not in told
    assert (fake.loads, files()) == ([], before)


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


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["speak", "Hi.", "--temprature", "1"], "fishrt speak --help"),
        (["speak", "Hi.", "--seed", "x"], "fishrt speak --help"),
        (["speak", "Hi.", "-f", "x.txt"], "fishrt speak --help"),
        (["voice", "add"], "fishrt voice add --help"),
        (["sing"], "fishrt --help"),
        (["--loud", "speak", "Hi."], "fishrt --help"),
    ],
)
def test_usage_errors_look_like_all_errors(fake, arguments, hint):
    result = CliRunner().invoke(main, arguments, prog_name="fishrt")
    assert result.exit_code == 2
    assert [line.split(": ")[0] for line in result.stderr.splitlines()] == ["error", "hint"]
    assert result.stderr.endswith(f"hint: {hint}\n")
    assert result.stdout == ""
    result = CliRunner().invoke(main, [*arguments, "--json"], prog_name="fishrt")
    error = json.loads(result.stdout)["error"]
    assert f"error: {error['message']}\n" in result.stderr
    assert error["hint"] == hint
    assert result.exit_code == 2


def test_a_group_without_a_command_shows_its_help(fake):
    for arguments in ([], ["voice"]):
        result = run(*arguments)
        assert "Commands:" in result.output
        assert "error: " not in result.output


def test_json_behind_two_dashes_is_text(fake):
    result = run("speak", "--", "--json")
    assert result.exit_code == 0
    assert fake.asked["text"] == "--json"
    assert result.stdout == ""


def test_what_was_spoken_before_an_error_is_written(fake):
    spoken = fake.speak("Hi.", progress=lambda _: None, voice=None, seed=1, sampling=Sampling())
    fake.failure = UnfinishedError(GraphError("the graph broke", hint="mend it"), spoken)
    result = run("speak", "Hi.", "-o", "a.wav")
    refused(result, "the graph broke")
    assert "warning: a.wav holds the 1.0 s that were spoken before the error\n" in result.stderr
    assert soundfile.info("a.wav").duration == 1.0


def test_what_was_streamed_before_an_error_is_written(fake, monkeypatch):
    def broken(text, **request):
        stream = type(fake).stream(fake, text, **request)
        pop = stream._job.pop

        def until():
            if getattr(fake, "given", 0) == 2:
                raise GraphError("the graph broke", hint="mend it")
            return pop()

        stream._job.pop = until
        return stream

    monkeypatch.setattr(fake, "stream", broken)
    result = run("speak", "Hi.", "--stream", "-o", "a.wav")
    refused(result, "the graph broke")
    assert "warning: a.wav holds the 0.5 s that were spoken before the error\n" in result.stderr
    assert soundfile.info("a.wav").duration == 0.5


def test_a_piece_that_was_cut_off_is_a_warning(fake):
    fake.stop_reason = "max_frames"
    says = 'the speech was cut off by the limit of its length: "Hi."'
    assert f"warning: {says}\n" in run("speak", "Hi.", "-q").stderr
    assert json.loads(run("speak", "Hi.", "--json").stdout)["warnings"] == [says]


# --- streams -------------------------------------------------------------------------------------------------------------------


def run_in_shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of sh in which `$fishrt` is the command with a FakeTts."""
    script = folder / "fake_fishrt.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1] / 'support')!r})\n"
        "import fishrt.tts, helpers_cli\n"
        "from pathlib import Path\n"
        "from fishrt.cli import main\n"
        "fake = helpers_cli.FakeTts(helpers_cli.bundle_folder(Path(sys.argv.pop(1))))\n"
        "fishrt.tts.TTS.load = lambda *_, **__: fake\n"
        "main(prog_name='fishrt')\n"
    )
    environment = {**os.environ, "fishrt": f"{sys.executable} {script} {folder / 'bundle'}"}
    return subprocess.run(["sh", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_stop_the_work(tmp_path, closed):
    for options in ("", "--json"):
        done = run_in_shell(f"$fishrt speak Hi. -o a.wav {options} {closed}; echo $? >status", tmp_path)
        assert (tmp_path / "status").read_text() == "0\n", done.stderr
        assert "Traceback" not in done.stderr
        assert soundfile.info(tmp_path / "a.wav").frames == RATE
        (tmp_path / "a.wav").unlink()
        shutil.rmtree(tmp_path / "bundle")


def test_errors_without_streams_are_still_a_status(tmp_path):
    run_in_shell("$fishrt speak ... <&- >&- 2>&-; echo $? >status", tmp_path)
    assert (tmp_path / "status").read_text() == "2\n"


def test_no_text_and_no_standard_input(tmp_path):
    done = run_in_shell("$fishrt speak <&-", tmp_path)
    assert done.stderr.startswith("error: there is no text")


@pytest.mark.slow
def test_a_standard_output_that_nobody_reads(tmp_path):
    for line in (
        "$fishrt speak Hi. -o - -q | true",
        "$fishrt speak Hi. --stream -o - -q | true",
        "$fishrt speak Hi. -o - -q >&-",
        "$fishrt inspect bundle | true",
    ):
        done = run_in_shell(line, tmp_path)
        assert "Traceback" not in done.stderr
        assert "BrokenPipe" not in done.stderr
        assert "Exception ignored" not in done.stderr
        shutil.rmtree(tmp_path / "bundle")


def test_a_standard_error_that_nobody_reads(tmp_path):
    run_in_shell("{ $fishrt speak Hi. -o a.wav; echo $? >status; } 2>&1 >/dev/null | true", tmp_path)
    assert (tmp_path / "status").read_text() == "0\n"
    assert soundfile.info(tmp_path / "a.wav").frames == RATE


FULL = "/dev/full"
"""A device to which nothing can be written."""


@pytest.mark.skipif(not Path(FULL).exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize(
    "command",
    (
        "speak Hi. -o -|speak Hi. --stream -o -|speak Hi. --json|codec encode RECORDING -o -|codec decode codes.npy -o -"
        "|inspect|inspect --json|voice list|doctor|--help|voice --help|help speak|--version"
    ).split("|"),
)
def test_a_standard_output_that_is_full(fake, recording, monkeypatch, capsys, command):
    """The error is the same for audio, codes, JSON, text and help."""
    np.save("codes.npy", np.ones((4, 3), np.int64))
    with Path(FULL).open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as ended:
            main(command.replace("RECORDING", recording).split(), "fishrt")
    assert ended.value.code == 2
    assert "error: cannot write to standard output: No space left on device" in capsys.readouterr().err.splitlines()


@pytest.mark.skipif(not Path(FULL).exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize("setting", ["", "PYTHONUNBUFFERED=1"])
def test_python_adds_no_error_to_that_of_a_full_output(tmp_path, setting):
    for command in ("speak Hi. -q -o -", "--help"):
        done = run_in_shell(f"{setting} $fishrt {command} >{FULL}; echo $? >status", tmp_path)
        assert done.stderr == "error: cannot write to standard output: No space left on device\n"
        assert (tmp_path / "status").read_text() == "2\n"
        shutil.rmtree(tmp_path / "bundle")


@pytest.mark.skipif(not Path(FULL).exists(), reason="this system has no device that is always full")
def test_a_standard_error_that_is_full(tmp_path):
    run_in_shell(f"$fishrt speak Hi. -o a.wav 2>{FULL}; echo $? >status", tmp_path)
    assert (tmp_path / "status").read_text() == "0\n"


def test_a_terminal_gets_nothing_binary(fake, recording, monkeypatch):
    monkeypatch.setattr("fishrt.audio.output._is_terminal", lambda: True)
    for command in (["speak", "Hi."], ["speak", "Hi.", "--stream"], ["codec", "encode", recording], ["codec", "decode", "a.npy"]):
        result = run(*command, "-o", "-", "--json")
        refused(result, "standard output is a terminal", "> FILE")
        assert json.loads(result.stderr.splitlines()[-1])["error"]["kind"] == "OutputError"
    assert fake.loads == []


# --- faults, JSON, encodings ---------------------------------------------------------------------------------------------------


def test_a_fault_of_ours_is_told_as_one(fake):
    fake.failure = ValueError("a bug")
    result = run("speak", "Hi.", "--json")
    assert "--debug" in refused(result, "fishrt has a fault: ValueError: a bug", kind=1)
    assert json.loads(result.stdout)["error"]["kind"] == "ValueError"
    with_traceback = run("speak", "Hi.", "--debug")
    assert with_traceback.exit_code == 1
    assert "Traceback" in with_traceback.stderr
    fake.failure = FishrtError("known")
    refused(run("speak", "Hi."), "known")


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["speak", "Hi."], "speak"),
        (["speak", "..."], "speak"),
        (["speak", "--seed", "x"], "speak"),
        (["voice", "list"], "voice list"),
        (["voice", "show", "nobody"], "voice show"),
        (["codec", "decode", "none.npy"], "codec decode"),
        (["inspect"], "inspect"),
        (["inspect", "nowhere"], "inspect"),
        (["doctor"], "doctor"),
        (["nothing"], ""),
    ],
)
def test_every_json_object_has_the_same_frame(fake, arguments, command):
    result = run(*arguments, "--json")
    data = json.loads(result.stdout)
    assert list(data)[:3] == ["command", "ok", "warnings"]
    assert (data["command"], data["ok"], data["warnings"]) == (command, result.exit_code == 0, [])
    if not data["ok"]:
        assert list(data) == ["command", "ok", "warnings", "error"]
        assert list(data["error"]) == ["kind", "message", "hint"]


def test_an_interruption_leaves_nothing_and_has_a_json_object(fake):
    Path("a.wav").write_bytes(b"old")
    fake.failure = KeyboardInterrupt()
    result = run("speak", "Hi.", "-o", "a.wav", "--json")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    assert json.loads(result.stdout)["error"]["kind"] == "Interrupted"
    assert files() == ["a.wav"]
    assert Path("a.wav").read_bytes() == b"old"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without a signal")
@pytest.mark.parametrize("ignored", [False, True])
def test_an_interruption_while_modules_are_imported_is_no_traceback(tmp_path, ignored):
    (tmp_path / "click.py").write_text("import sys\nprint('importing', flush=True)\nsys.stdin.read()\nraise SystemExit(7)")
    command = [sys.executable, "-m", "fishrt", "--version"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL)
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    try:
        process = subprocess.Popen(command, env=environment, text=True, **pipes)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        said = "" if ignored else process.stderr.read()
    assert (process.returncode, said) == ((7, "") if ignored else (130, "interrupted\n"))


def test_an_interruption_before_the_command_is_no_fault(fake, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Commands, "make_context", interrupted)
    result = run("speak", "Hi.")
    assert (result.exit_code, result.stderr.split()) == (130, ["interrupted"])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without a signal")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_ends_the_process_leaves_no_partial_file(tmp_path, name):
    text = "Good morning, my friend. " * 1000
    command = [sys.executable, "-m", "fishrt", "speak", "--stream", "-o", str(tmp_path / "a.wav"), "-f", "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdin.write(text)
        process.stdin.close()
        while not list(tmp_path.iterdir()):
            assert process.poll() is None
        process.send_signal(getattr(signal, name))
        assert process.stderr.read().splitlines()[-1] == "interrupted"
    assert process.returncode == 130
    assert not list(tmp_path.iterdir())


ODD = os.fsdecode("dé😀".encode() + b"\xff")
"""A path that is not UTF-8, with characters that few encodings have."""


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["speak", "Hi.", "-o", f"{ODD}.wav"], 0),
        (["speak", "Hi.", "--stream", "-o", f"{ODD}.wav"], 0),
        (["speak", "-f", ODD], 2),
        (["speak", "Hi.", "--reference", ODD, "--reference-text", "x"], 2),
        (["speak", "Hi.", "--voice", ODD], 2),
        (["codec", "encode", "RECORDING", "-o", f"{ODD}.npy"], 0),
        (["codec", "encode", ODD], 2),
        (["codec", "decode", ODD], 2),
        (["voice", "list", "--voice-dir", ODD], 0),
        (["inspect", ODD], 2),
        (["inspect", "--verify", "BUNDLE"], 0),
        ([ODD], 2),
    ],
)
def test_paths_that_no_encoding_has(fake, recording, encoding, command, status):
    """JSON objects and messages contain such paths without a further error, on success and on failure."""
    odd_bundle = fake.bundle.path.with_name(ODD)
    fake.bundle.path.rename(odd_bundle)
    fake.bundle = replace(fake.bundle, path=odd_bundle)
    words = [{"RECORDING": recording, "BUNDLE": str(odd_bundle)}.get(word, word) for word in command]
    for options in ([], ["--json"]):
        result = CliRunner(charset=encoding).invoke(main, [*words, *options], prog_name="fishrt")
        assert result.exit_code == status, result.stderr
    assert json.loads(result.stdout_bytes)["ok"] is (status == 0)


def test_json_of_a_process_has_a_path_that_is_not_utf8(tmp_path):
    """In a real process: the runner of the other tests replaces the streams."""
    line = "PYTHONIOENCODING=utf-8:strict $fishrt speak Hi. --json -o \"$(printf 'a\\377.wav')\""
    done = run_in_shell(line, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.fsencode(json.loads(done.stdout)["output"]) == b"a\xff.wav"


def test_help_in_an_encoding_that_lacks_its_characters(tmp_path):
    done = run_in_shell("PYTHONIOENCODING=ascii $fishrt bench --help", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: fishrt bench" in done.stdout


# --- the command about itself --------------------------------------------------------------------------------------------------


def test_help_of_commands(fake):
    assert run("help").stdout == run("--help").stdout
    assert run("help", "voice", "add").stdout == run("voice", "add", "--help").stdout


@pytest.mark.parametrize(
    ("group", "first"), [([], ["speak", "render", "serve", "voice", "export"]), (["voice"], ["add"]), (["codec"], ["decode"])]
)
def test_the_commands_are_listed_by_use_and_whole(fake, group, first):
    lines = run(*group, "--help").stdout.split("Commands:")[1].split("Exit status:")[0].strip().splitlines()
    assert [line.split()[0] for line in lines][: len(first)] == first
    assert not [line for line in lines if line.endswith("...")]


def test_version(fake):
    assert run("-V").stdout == run("--version").stdout == f"fishrt {fishrt.__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell):
    if shell == "bash" and shutil.which("bash") is None:
        pytest.skip("click asks bash for its version")
    assert "_FISHRT_COMPLETE" in run("completion", shell).stdout


def test_verbose_shows_the_log(fake, monkeypatch):
    def speak(text, **request):
        logging.getLogger("fishrt_engines.providers").info("chose %s", "cpu")
        logging.getLogger("fishrt").warning("odd")
        logging.getLogger("fishrt").warning("odd")
        raise FishrtError("enough")

    monkeypatch.setattr(fake, "speak", speak)
    assert run("speak", "Hi.").stderr == "warning: odd\nerror: enough\n"
    failed = run("speak", "Hi.", "-v", "--json")
    assert failed.stderr == "fishrt_engines.providers: chose cpu\nwarning: odd\nerror: enough\n"
    assert json.loads(failed.stdout)["warnings"] == ["odd"]
    assert not logging.getLogger("fishrt").handlers
