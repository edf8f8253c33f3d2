"""`fishrt retarget`: forms for further providers in a finished bundle."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from ...bundle.manifest import TARGETS
from ...errors import FishrtError
from ...progress import size
from ..base.commands import print_json
from ..base.options import json_option, quiet_option
from ..base.progress import Reporter


@click.command(short_help="Add the graphs that another provider runs fastest.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--target",
    "targets",
    type=click.Choice(TARGETS),
    multiple=True,
    required=True,
    help="A provider for which the graphs are made. May be given several times.",
)
@quiet_option
@json_option
def retarget(bundle: Path, targets: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """Make the graphs of BUNDLE again in the forms that a provider runs fastest, and compare those that a CPU runs.

    Weights and portable graphs stay. It needs no torch: pip install "fishrt[retarget]". A bundle of schema 3 is brought up to
    date. The folder is replaced when all is done. The graph that draws a whole frame on CUDA and TensorRT comes from an export
    with that target; without it, CUDA runs the fast AR for each code.
    """
    reporter = Reporter(quiet=quiet or as_json)
    try:
        from fishrt_export.retarget import retarget as make
    except ImportError as error:
        raise FishrtError(f"this needs {error.name}, which is not installed", hint='pip install "fishrt[retarget]"') from None
    made = make(bundle, targets, reporter.show)
    forms = [(role, form) for role, graph in made.manifest.graphs.items() for form in graph.forms if form.provider in targets]
    if as_json:
        print_json({"bundle": str(bundle), "forms": [{"role": role, "form": dataclasses.asdict(form)} for role, form in forms]})
        return
    lines = [
        f"{role:<14}{form.provider:<10}{file}, {size(made.manifest.files[file].bytes)}"
        for role, form in forms
        for file in form.files
    ]
    named = ", ".join(targets)
    end = f"\n{bundle} has these graphs for {named} now" if lines else f"nothing was added: {named} runs the portable graphs"
    reporter.done("\n".join([*lines, end]))
