"""Options of `fishrt speak` for diffusion models."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from fishrt.cli import main
from fishrt.cli.base.denoising import SpeakingCommand, denoising_options
from fishrt.diffusion.denoising import PRESETS, Denoising


def parsed(*arguments: str) -> Denoising | None:
    found: list[Denoising | None] = []
    command = click.command(cls=SpeakingCommand)(denoising_options(lambda denoising: found.append(denoising)))
    result = CliRunner().invoke(command, arguments, catch_exceptions=False, standalone_mode=False)
    assert result.return_value is None
    return found[0]


def test_without_an_option_the_bundle_decides() -> None:
    assert parsed() is None


def test_options_replace_those_of_a_preset() -> None:
    assert parsed("--preset", "low-mid") == PRESETS["low_mid"]
    found = parsed("--preset", "low_mid", "--steps", "4,5,6", "--cfg-text", "2", "--force-speaker", "1.2")
    assert found == Denoising((4, 5, 6), cfg_text=2.0, force_speaker=1.2).over(PRESETS["low_mid"])
    assert parsed("--steps", "20", "--blocks", "32, 608") == Denoising(20, blocks=(32, 608))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--preset nobody", "there is no preset"),
        ("--blocks 32,x", "is not a whole number"),
        ("--steps 0", "x>=1"),
        ("--steps 1,2 --blocks 8", "2 values for 1 block"),
        ("--steps 8", "is for diffusion models"),
    ],
)
def test_bad_options(arguments: str, said: str) -> None:
    result = CliRunner().invoke(main, ["speak", "Hi.", "-o", "none.wav", *arguments.split()])
    assert (result.exit_code, said in result.output) == (2, True), result.output


def test_help_has_a_section_of_its_own() -> None:
    said = CliRunner().invoke(main, ["speak", "--help"]).output
    assert said.index("Options of diffusion models:") < said.index("--cfg-speaker")
    assert said.index("--temperature") < said.index("Options of diffusion models:")
