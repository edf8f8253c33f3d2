"""The recipe of the embedded voice, a stage at a time: `cd export && python -m minnow.recipe --help`."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from .package import write_checkpoint
from .synth import SpeechData, synthesise
from .train_decoder import encode_corpus, train_decoder
from .train_encoder import train_encoder
from .train_lm import train_lm
from .train_tokens import train_tokens

STEPS = {"tokens": 2500, "decoder": 5500, "encoder": 2500, "lm": 5000}


@click.command(context_settings={"show_default": True})
@click.argument("stage", type=click.Choice(["synth", "tokens", "encode", "decoder", "encoder", "lm", "package"]))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--threads", default=0, help="CPU threads; 0 leaves the choice to torch.")
@click.option("--steps", type=int, help="Training steps of this stage, if not the recipe's own: " + str(STEPS))
@click.option("--out", type=click.Path(path_type=Path), help="Checkpoint folder that `package` writes.")
def main(stage: str, folder: Path, threads: int, steps: int | None, out: Path | None) -> None:
    """Run one STAGE in FOLDER.

    The order is: synth, tokens, encode, then decoder, encoder and lm in parallel or in turn, then package.

    synth needs Debian's packages flite, fortunes, fortunes-min and scowl, and about 4 GB. Every training stage saves its state
    every two minutes, resumes from it, and logs to FOLDER/STAGE.jsonl.
    """
    if threads:
        torch.set_num_threads(threads)
    if stage == "synth":
        synthesise(folder / "speech", templates=10_000, word_lists=20_000, seed=1)
    elif stage == "package":
        if out is None:
            raise click.UsageError("package needs --out, the checkpoint folder to write")
        write_checkpoint(folder, out)
    else:
        data, count = SpeechData(folder / "speech"), steps or STEPS.get(stage, 0)
        if stage == "tokens":
            train_tokens(folder, data, steps=count, hours=5)
        elif stage == "encode":
            encode_corpus(folder, data)
        elif stage == "decoder":
            train_decoder(folder, data, steps=count)
        elif stage == "encoder":
            train_encoder(folder, data, steps=count)
        else:
            train_lm(folder, data, steps=count)


if __name__ == "__main__":
    main()
