"""The options by which commands say how to speak."""

from __future__ import annotations

import functools
from typing import Any

import click

from .options import Command, Number, Whole

voices_option = click.option(
    "--voice",
    "names",
    multiple=True,
    metavar="NAME",
    help="A voice of yours or of the bundle; see `fishrt voice list`. The first one is speaker 0; repeat the "
    "option for speakers 1, 2, …",
)
max_frames_option = click.option(
    "--max-frames",
    type=Whole(min=1),
    metavar="N",
    help="Stop each piece of a long text after N frames, of which `fishrt inspect` shows the rate.",
)
system_option = click.option(
    "--system", metavar="TEXT", help="System text that replaces the usual instruction, for models that take one."
)
speed_option = click.option(
    "--speed",
    type=Number(min=0.25, max=4),
    default=1.0,
    show_default=True,
    metavar="FACTOR",
    help='Speak faster or slower at the same pitch; 2 takes half the time. Needs: pip install "fishrt[server]".',
)
_SAMPLING = (
    click.option(
        "--temperature",
        type=Number(min=0, max=2, max_open=True),
        metavar="T",
        help="Sampling temperature: a lower one is steadier, a higher one livelier; 0 is greedy decoding.  "
        "[default: the bundle's]",
    ),
    click.option(
        "--top-p",
        type=Number(min=0, min_open=True, max=1),
        metavar="P",
        help="Nucleus sampling: keep the smallest set of tokens whose probabilities add up to P.  [default: the bundle's]",
    ),
    click.option(
        "--top-k",
        type=Whole(min=1),
        metavar="K",
        help="Top-k sampling: keep the K most probable tokens.  [default: the bundle's]",
    ),
    click.option(
        "--repetition-penalty",
        type=Number(min=0, min_open=True, max=2),
        metavar="R",
        help="Make the tokens of the last frames less probable by this factor; 1 changes nothing. Only for models that are "
        "sampled with one.  [default: the bundle's]",
    ),
)


def sampling_options(command: Command) -> Command:
    """Add the options of sampling; the command gets them as `sampling`."""

    @functools.wraps(command)
    def collected(
        *args: Any,
        temperature: float | None,
        top_p: float | None,
        top_k: int | None,
        repetition_penalty: float | None,
        **rest: Any,
    ) -> Any:
        from ...language_model.sampling import Sampling

        return command(*args, sampling=Sampling(temperature, top_p, top_k, repetition_penalty), **rest)

    decorated: Command = collected
    for option in reversed(_SAMPLING):
        decorated = option(decorated)
    return decorated
