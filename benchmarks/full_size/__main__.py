"""Writing of a checkpoint of official size and layout with random weights: `cd benchmarks && python -m full_size FAMILY OUT`.

It serves to measure size, memory and speed: its speech is noise. Its tokenizer tokenizes English, its codes decode to audio that
is not clipped, and its end token is improbable. Needs the `dev` extra; 1 to 11 GB of disk.
"""

from __future__ import annotations

from pathlib import Path

import click

from . import FAMILIES, write_checkpoint
from .echo import ECHO


@click.command(context_settings={"show_default": True})
@click.argument("family", type=click.Choice([*FAMILIES, ECHO]))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", default=0, help="The same seed gives the same files.")
@click.option("--tiny", is_flag=True, help="The same layout in a few MB.")
@click.option("--layers", type=click.IntRange(min=1), help="Layers of S2-Pro's slow AR in place of 36; the codec is small.")
def main(family: str, out: Path, seed: int, tiny: bool, layers: int | None) -> None:
    """Write a checkpoint of FAMILY into the folder OUT."""
    write_checkpoint(
        family, out, seed=seed, tiny=tiny, layers=layers, progress=lambda part: click.echo(f"writing {part}", err=True)
    )
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    click.echo(f"{size / 1e9:.2f} GB in {out}", err=True)


if __name__ == "__main__":
    main()
