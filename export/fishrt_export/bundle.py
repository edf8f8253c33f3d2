"""A checkpoint folder → a bundle folder: check all of it, write and verify each graph, add voices and licence, then the manifest.

All is written into a hidden folder beside OUT, which gets its name when it is complete. The manifest is written last, so that
whatever stops an export, nothing that loads is left.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from fishrt.bundle import MANIFEST, SCHEMA, Bundle, Codec, LanguageModel, Licence, Manifest, Parity, describe_files
from fishrt.errors import FishrtError
from fishrt.version import __version__

from .checkpoint import TOKENIZER
from .codec.dac import MAX_FRAMES
from .errors import ExportError
from .graphs import CodecSource, GraphJob, LanguageModelSource, open_codec, open_language_model
from .licence import copy_licence
from .voices import check_references, encode_references
from .weights import refuse

Progress = Callable[[str, float], None]
"""Told the name of a stage as it begins, and the part of the export that is done, 0..1."""


def export_bundle(
    checkpoint: str | Path, out: str | Path, *, head: str = "audio", progress: Progress = lambda _stage, _done: None
) -> Bundle:
    """Exports the checkpoint in the folder `checkpoint` as a bundle in the new or empty folder `out`.

    head: "audio" keeps the logits of the tokens that can be spoken, "full" those of the whole vocabulary.
    Raises ExportError for a checkpoint that is incomplete, damaged or of an unknown family, with every tensor that does not fit
    listed at once; for an `out` that is not empty or cannot be written; and for a graph that is not equal to its torch module.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    _check_out(out)
    progress("reading the checkpoint", 0.0)
    language_model, codec = open_language_model(checkpoint), open_codec(checkpoint)
    refuse([*language_model.problems(), *codec.problems()])
    if (of_model := language_model.config.num_codebooks) != (of_codec := len(codec.config.codebook_sizes)):
        raise ExportError(
            f"the language model has {of_model} codebooks and the codec has {of_codec}",
            hint="take both from one checkpoint",
        )
    jobs = [*codec.jobs(), *language_model.jobs(head)]
    draft = Manifest(
        schema=SCHEMA,
        name=checkpoint.resolve().name,
        exported_by=f"fishrt {__version__}",
        language_model=describe_language_model(language_model, head),
        codec=describe_codec(codec),
        tokenizer=TOKENIZER,
        graphs={job.role: job.spec for job in jobs},
        precision="float32",
        # What follows is known only when the files are there.
        parity={},
        licence=Licence("", None),
        voices=None,
        files={},
    )
    references = check_references(checkpoint, Bundle(out, draft))
    with _written_aside(out) as folder:
        shutil.copyfile(language_model.tokenizer, folder / TOKENIZER)
        licence = copy_licence(checkpoint, folder)
        parity = _run(jobs, folder, progress)
        voices = encode_references(references, Bundle(folder, draft))
        progress("hashing the files", 1.0)
        files = dict(describe_files(folder))
        manifest = replace(draft, parity=parity, licence=licence, voices=voices, files=files)
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return Bundle.load(out)


def _check_out(out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        what = "is not empty" if out.is_dir() else "is a file"
        raise ExportError(f"{out} exists and {what}", hint="name a folder that does not exist yet")


@contextmanager
def _written_aside(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` if the block succeeds, and disappears if it does not."""
    out = out.absolute()
    aside = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        yield aside
        if out.exists():
            out.rmdir()
        aside.rename(out)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, FishrtError):
            raise ExportError(f"{out} cannot be written: {error}", hint="is there room, and may you write there?") from error
        raise


def _run(jobs: list[GraphJob], folder: Path, progress: Progress) -> dict[str, Parity]:
    """Writes and verifies all graphs. A graph counts by its number of weights, and verifying it is half of the work."""
    sizes = {job.role: sum(tensor.numel() for tensor in job.weights.values()) for job in jobs}
    halves = 0

    def tell(stage: str) -> None:
        nonlocal halves
        progress(f"{job.role}: {stage}", 0.5 * halves / sum(sizes.values()))
        halves += sizes[job.role]

    parity = {}
    for job in jobs:
        parity[job.role] = job.run(folder, tell)
    return parity


def describe_language_model(source: LanguageModelSource, head: str) -> LanguageModel:
    """The manifest's entry."""
    return LanguageModel(
        num_codebooks=source.config.num_codebooks,
        codebook_width=source.config.codebook_width,
        max_seq_len=source.config.max_seq_len,
        head=head,
        vocab_size=source.config.vocab_size,
        semantic_begin_id=source.ids.semantic[0],
        semantic_end_id=source.ids.semantic[-1],
        end_id=source.ids.end,
        prompt_dialect=source.family.prompt_dialect,
        chunk_bytes=source.family.chunk_bytes,
        sampling=source.family.sampling,
    )


def describe_codec(source: CodecSource) -> Codec:
    """The manifest's entry."""
    return Codec(
        sample_rate=source.config.sample_rate,
        hop=source.config.hop,
        codebook_sizes=source.config.codebook_sizes,
        max_frames=MAX_FRAMES,
        fingerprint=source.fingerprint,
    )
