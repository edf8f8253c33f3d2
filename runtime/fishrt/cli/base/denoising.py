"""The options of a command that speaks with a diffusion model, in a section of its help of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from ...diffusion.denoising import Denoising, preset
from ...errors import SamplingError
from .options import Command, Number, Whole


class _Several(click.ParamType):  # type: ignore[type-arg]  # generic in new versions of click only
    """A number, or one for each block, separated by commas: a tuple."""

    def __init__(self, one: Whole) -> None:
        self._one, self.name = one, one.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return (
            tuple(self._one.convert(part.strip(), param, ctx) for part in value.split(",")) if isinstance(value, str) else value
        )


class _DiffusionOption(click.Option):
    """An option for diffusion models only."""


class SpeakingCommand(click.Command):
    """A command whose help has the options for diffusion models in a section of their own."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write both sections."""
        sections: dict[str, list[tuple[str, str]]] = {"Options": [], "Options of diffusion models": []}
        for param in self.get_params(ctx):
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx)) is not None:
                sections[[*sections][isinstance(param, _DiffusionOption)]].append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _preset(_ctx: click.Context, _param: click.Parameter, name: str | None) -> Denoising:
    try:
        return Denoising() if name is None else preset(name)
    except SamplingError as error:
        raise click.BadParameter(f"{error}; {error.hint}") from None


_OPTIONS: dict[str, dict[str, Any]] = {
    "--preset": {
        "callback": _preset,
        "metavar": "NAME",
        "help": "Settings of the original programs: default, low-mid, low and equal have blocks, for a stream; "
        "independent-high-speaker-cfg, independent-high-cfg, independent-low-cfg, each also with -flat, have guidance and 40 "
        "steps. The other options replace theirs.",
    },
    "--steps": {
        "type": _Several(Whole(min=1)),
        "metavar": "N[,N]…",
        "help": "Euler steps, or those of each block: fewer are faster and coarser.  [default: the bundle's; those of --preset "
        "default for its blocks]",
    },
    "--cfg-text": {
        "type": Number(min=0),
        "metavar": "W",
        "help": "Weight of the guidance by text; 0 is none.  [default: the bundle's]",
    },
    "--cfg-speaker": {
        "type": Number(min=0),
        "metavar": "W",
        "help": "Weight of the guidance by voice; 0 is none.  [default: the bundle's]",
    },
    "--force-speaker": {
        "type": Number(min=0, min_open=True),
        "metavar": "FACTOR",
        "help": "Bring a voice nearer that is imitated badly, such as 1.3.  [default: no]",
    },
    "--blocks": {
        "type": _Several(Whole(min=1)),
        "metavar": "N,N,…",
        "help": "Frames of each block; with --stream or --play, a block is heard while the next is made.  [default: those of "
        "--preset default with --stream or --play, else one block]",
    },
}


def denoising_options(command: Command) -> Command:
    """Add the options for diffusion models to a `SpeakingCommand`; it gets them as `denoising`, None without any."""
    names = [name.lstrip("-").replace("-", "_") for name in _OPTIONS]

    @functools.wraps(command)
    def collected(*args: Any, **given: Any) -> Any:
        base, *own = (given.pop(name) for name in names)
        settings = dict(zip(names[1:], own, strict=True))
        if settings["steps"] and len(settings["steps"]) == 1:
            (settings["steps"],) = settings["steps"]  # for all blocks
        found = Denoising(**settings).over(base)
        return command(*args, denoising=None if found == Denoising() else found, **given)

    decorated: Callable[..., Any] = collected
    for name, settings in reversed(_OPTIONS.items()):
        decorated = click.option(name, cls=_DiffusionOption, **settings)(decorated)
    return decorated
