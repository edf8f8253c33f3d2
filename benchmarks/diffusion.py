"""A diffusion model of official size on this CPU: `python benchmarks/diffusion.py` writes results/diffusion.json.

Bundles in several precisions and the exporter's torch module of the denoiser, in float32 and in bfloat16, take turns for
`--rounds` rounds, each in a new process. Ratios are of medians over the rounds. A turn measures one call of the denoiser with one
row and with three, the rows of guidance, for the whole window and for a first block; a bundle's turn also measures what is
computed once, the decoder, and the first block of a stream. The times of whole utterances are sums of these, for a number of
steps of which half have guidance. Weights are random. Needs the `dev` extra, 16 GB of memory and 25 GB of disk.
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import click

from diffusion_process import FIRST, SAMPLE_FRAMES, TEXT_TOKENS, VOICE_FRAMES
from fishrt.metrics import speed_up
from harness import HERE, Made, compare, python, shared_options, tell
from record import RESULTS, write_record

RECIPES = {recipe: ("--precision", recipe) for recipe in ("fp32", "int8", "int8-rows", "int4")}
PEERS = ("torch-fp32", "torch-bf16")
STEPS = (40, 20, 10)
_CALLS = [f"{what}_{rows}" for what in ("whole", "block") for rows in (1, 3)]
FIGURES = {
    **{f"{call}_ms": (f"{call}_ms",) for call in _CALLS},
    **{name: (name,) for name in ("text_ms", "voice_ms", "schedule_ms", "decode_s", "first_audio_s", "peak_bytes")},
}


@click.command(context_settings={"show_default": True})
@shared_options
@click.option("--recipe", "recipes", type=click.Choice(list(RECIPES)), multiple=True, default=list(RECIPES), help="Bundles.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, help="Turns of each side.")
@click.option("--output", type=click.Path(path_type=Path), help="Record to write.  [default: results/diffusion.json]")
def main(
    recipes: tuple[str, ...], rounds: int, output: Path | None, smoke: bool, bundles: Path | None, checkpoints: Path | None
) -> None:
    """Measure calls of the denoiser, and write the record."""
    rounds = 1 if smoke else rounds
    with tempfile.TemporaryDirectory(prefix="fishrt-bench-") as folder:
        made = Made(
            "echo", checkpoints or Path(folder, "c"), bundles or Path(folder, "b"), RECIPES, tiny=smoke, run=partial(python)
        )
        tell("checkpoint")
        made.write_checkpoint()
        exports = {}
        for recipe in recipes:
            tell(f"export: {recipe}")
            exports[recipe] = made.export(recipe)
        turns: dict[str, list[dict[str, Any]]] = {side: [] for side in (*recipes, *PEERS)}
        for n in range(rounds):
            for side, measured in turns.items():
                tell(f"round {n + 1} of {rounds}: {side}")
                place = made.checkpoint if side in PEERS else made.bundle(side)
                measured.append(json.loads(python(HERE / "diffusion_process.py", side, place)))
        found = {
            "method": {
                **{"rounds": rounds, "window_frames": SAMPLE_FRAMES, "text_tokens": TEXT_TOKENS, "voice_frames": VOICE_FRAMES},
                **{"first_block": FIRST, "weights": "random" + (" and tiny" if smoke else ", of official size and layout")},
            },
            "exports": exports,
            "turns": turns,
            "medians": (medians := compare(turns, FIGURES)),
            "seconds_per_audio_second": {side: per_second(medians, side) for side in turns},
            "speed_up": {recipe: gains(medians, recipe) for recipe in recipes},
        }
        output = output or (Path(folder, "smoke.json") if smoke else RESULTS / "diffusion.json")
        for name in ("seconds_per_audio_second", "speed_up"):
            tell(f"{name}: {json.dumps(found[name])}")
        tell(f"written: {write_record('diffusion', found, output)}")


def per_second(medians: dict[str, Any], side: str) -> dict[str, float]:
    """Return seconds of the denoiser for a second of audio, by the number of steps: half of them with three rows."""
    alone, guided = (medians[f"whole_{rows}_ms"][side] / 1e3 for rows in (1, 3))
    audio_s = SAMPLE_FRAMES * 2048 / 44100
    return {str(steps): round(steps / 2 * (alone + guided) / audio_s, 3) for steps in STEPS}


def gains(medians: dict[str, Any], recipe: str) -> dict[str, float]:
    """Return the time of the faster torch module ÷ that of a bundle, for each call."""
    calls = {call: medians[f"{call}_ms"] for call in _CALLS}
    return {call: round(speed_up(of[recipe], min(of[peer] for peer in PEERS)), 2) for call, of in calls.items()}


if __name__ == "__main__":
    main()
