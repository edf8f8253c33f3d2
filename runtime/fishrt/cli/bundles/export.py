"""`fishrt export`: a checkpoint → a bundle."""

from __future__ import annotations

import dataclasses
import shlex
import time
from functools import partial
from pathlib import Path
from typing import Any

import click

from fishrt_engines import GraphSpec
from fishrt_engines.machine import peak_memory

from ...bundle.folder import Bundle
from ...bundle.manifest import MANIFEST, PRECISIONS, TARGETS, Parity, Rounding
from ...errors import FishrtError
from ...hub.download import Choose, download
from ...hub.repository import Repository, names_repository
from ...progress import size
from ..base.commands import print_json
from ..base.options import CPU_TORCH, Number, Whole, json_option, quiet_option
from ..base.progress import Reporter, duration

_EXPORT_NEEDS = ("torch", "onnx", "onnxscript", "onnx_ir", "safetensors", "onnxruntime")


class _ExportCommand(click.Command):
    """A command whose help ends with a list of the official checkpoints."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from fishrt_export.checkpoint.families import ECHO, FAMILIES

        listed = [(f.repository, f"{f.files} (--family {f.name})") for f in FAMILIES.values()]
        with formatter.section("Official checkpoints on the Hugging Face Hub"):
            formatter.write_dl([*listed, (ECHO.repository, ECHO.files)])


def _parse_keep(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Return the precision by name, from values NAME=PRECISION. The exporter checks names and precisions."""
    pairs = [value.rpartition("=") for value in values]
    if wrong := [value for value, (name, _, _) in zip(values, pairs, strict=True) if not name]:
        raise click.BadParameter(f"{wrong[0]!r} is not NAME=PRECISION")
    return {name: precision for name, _, precision in pairs}


@click.command(cls=_ExportCommand, short_help="Turn the weights of an official model into a bundle.")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--revision", metavar="NAME", help="Branch, tag or commit of a CHECKPOINT that is OWNER/NAME.  [default: main]")
@click.option(
    "--head",
    type=click.Choice(["audio", "full"]),
    default="audio",
    show_default=True,
    help="Logits of the slow AR: of the tokens that can be spoken, or of the whole vocabulary (larger, slower; for comparisons).",
)
@click.option("--family", metavar="NAME", help="The family of the checkpoint, if it cannot be found from the files: see below.")
@click.option("--lora", type=click.Path(path_type=Path), metavar="FILE", help="Merge the LoRA of a fine-tuning into the model.")
@click.option(
    "--lora-alpha",
    type=Number(min=0, min_open=True),
    metavar="A",
    help="The alpha of the LoRA. No file states it: 16 for a config named r_8_alpha_16.",
)
@click.option("--lora-rank", type=Whole(min=1), metavar="R", help="Require this rank of the LoRA.  [default: any rank]")
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The file of weights, of several in CHECKPOINT.  [default: the first set, in the order of the originals]",
)
@click.option(
    "--codec",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="The codec's file or folder, or its OWNER/NAME on the Hub, where CHECKPOINT has none.  [default: in CHECKPOINT; for a "
    "diffusion model also beside it, and for its repository the official one]",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="The tokenizer's file or folder, where CHECKPOINT has none.",
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="How weights are stored.  [default: as in the checkpoint, with its integers if it is quantised]  fp32: the same, but "
    "integers become floats. fp16: rounded to 16 bits. int8: linear layers of the model in 8 bits. int8-rows: the same for a CPU "
    "that speaks many requests at once, with coarser activations. int4: as int8, but the layers of the slow AR or of the "
    "denoiser in 4 bits.",
)
@click.option(
    "--keep",
    metavar="NAME=PRECISION",
    multiple=True,
    callback=_parse_keep,
    help="Store some layers in another precision: 'slow_ar.layers.0.*=int8', fast_ar.output=fp32. May be given several times: "
    "the last one that matches a layer counts.",
)
@click.option(
    "--target",
    "targets",
    type=click.Choice(TARGETS),
    multiple=True,
    help="Add graphs in the form that this provider runs fastest; those for cpu are always made. May be given several times. "
    "coreml: the codec's decoder in fixed sizes, for macOS; the language model runs on the CPU there.",
)
@click.option("--static", type=click.Choice(["coreml"]), help="The same as --target coreml.")
@click.option(
    "--codec-int8",
    is_flag=True,
    help="Add a second codec decoder with most convolutions in 8 bits, which CPUs with VNNI use: faster, a little more noise. "
    "Only for codecs of the kind DAC.",
)
@quiet_option
@json_option
def export(
    checkpoint: Path,
    out: Path,
    revision: str | None,
    head: str,
    family: str | None,
    lora: Path | None,
    lora_alpha: float | None,
    lora_rank: int | None,
    weights: Path | None,
    codec: Path | None,
    tokenizer: Path | None,
    precision: str | None,
    keep: dict[str, str],
    targets: tuple[str, ...],
    static: str | None,
    codec_int8: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Turn CHECKPOINT into the bundle OUT, and verify every graph against the torch module.

    CHECKPOINT is a folder with the files of an official model or of another form of its weights, a file of weights with the rest
    beside it, or a repository OWNER/NAME of the Hugging Face Hub. A repository is downloaded into the hub's cache first; the next
    call resumes a download that breaks off. `fishrt inspect CHECKPOINT` tells the form.

    An export takes one to seven minutes for an official model on two CPU cores, and up to 9 GB of memory. It needs torch, and no
    GPU: install torch's CPU build as https://pytorch.org/get-started/locally/ shows, then pip install "fishrt[export]". Nothing
    is left behind when it fails or is interrupted.
    """
    if lora is None and (lora_alpha is not None or lora_rank is not None):
        raise click.UsageError(f"--lora-{'alpha' if lora_alpha is not None else 'rank'} needs --lora")
    if lora is not None and lora_alpha is None:
        raise click.UsageError("--lora needs --lora-alpha")
    if revision is not None and not names_repository(checkpoint):
        raise click.UsageError(f"--revision is for OWNER/NAME of the Hugging Face Hub, and {checkpoint} is a folder")
    reporter, begun = Reporter(quiet=quiet or as_json), time.monotonic()
    try:
        from fishrt_export import Lora, Options
        from fishrt_export.checkpoint.diffusion.files import is_diffusion
        from fishrt_export.checkpoint.forms.folder import Checkpoint
        from fishrt_export.place import check_out

        merged = None if lora is None or lora_alpha is None else Lora(lora, lora_alpha, lora_rank)
        asked = (*targets, static) if static else targets
        options = Options(head, family, merged, precision, keep, asked, codec_int8, codec, tokenizer, weights)
        check_out(out)
        if not names_repository(checkpoint) and not is_diffusion(checkpoint):
            given = None if codec is not None and names_repository(codec) else codec
            parts = ("weights", "tokenizer") if given is None and codec is not None else ()
            Checkpoint.of(checkpoint, weights=weights, tokenizer=tokenizer, codec=given).check(*parts)
        from fishrt_export import export_bundle  # after what is checked without torch, which takes seconds to import

        located, codec = _located(checkpoint, revision, options, quiet=quiet or as_json)
        bundle = export_bundle(located, out, dataclasses.replace(options, codec=codec), progress=reporter.show)
    except ImportError as error:
        if (error.name or "").split(".")[0] not in _EXPORT_NEEDS:
            raise
        raise FishrtError(
            f"exporting needs {error.name}, which is not installed", hint=f'{CPU_TORCH}; then: pip install "fishrt[export]"'
        ) from None
    seconds, peak = time.monotonic() - begun, peak_memory()
    if as_json:
        print_json(_result(bundle, out, seconds, peak))
    else:
        reporter.done("\n".join(_report(bundle, out, seconds, peak)))


def _located(checkpoint: Path, revision: str | None, options: Any, *, quiet: bool) -> tuple[Path, Path | None]:
    """Return the folders of the checkpoint and of its codec; repositories of the hub are downloaded into its cache.

    options: of the exporter. No codec is the official one for a repository of a diffusion model.
    """
    from fishrt_export.checkpoint import names
    from fishrt_export.checkpoint.diffusion.files import CODEC_REPOSITORY, choose_codec, choose_files, is_diffusion

    reporter, codec = Reporter(quiet=quiet), options.codec
    given = [name for name, path in ((names.CODEC, codec), (names.TOKENIZER, options.tokenizer)) if path is not None]
    weights = None if options.weights is None else options.weights.as_posix()

    def fetch(path: Path, revision: str | None, choose: Choose) -> Path:
        return download(Repository.parse(path.as_posix(), revision), choose, progress=reporter.show)

    try:
        folder = checkpoint
        if names_repository(checkpoint):
            folder = fetch(checkpoint, revision, partial(choose_files, weights=weights, given=given))
            codec = codec or (Path(CODEC_REPOSITORY) if is_diffusion(folder) else None)
        if codec is not None and names_repository(codec):
            codec = fetch(codec, None, choose_codec if is_diffusion(folder) else names.choose_codec)
        return folder, codec
    finally:
        reporter.clear()


def _files(bundle: Bundle) -> dict[str, int]:
    """Return the bytes of every file."""
    sizes = {name: entry.bytes for name, entry in bundle.manifest.files.items()}
    return {**sizes, MANIFEST: bundle.file(MANIFEST).stat().st_size}


def _measured(bundle: Bundle) -> list[tuple[GraphSpec, Parity]]:
    """Return each graph that was compared with torch, and its error."""
    found = []
    for graph in bundle.manifest.graphs.values():
        found += [(graph.spec, graph.parity), *((form.spec, form.parity) for form in graph.forms)]
    return [(spec, parity) for spec, parity in found if parity is not None]


def _roundings(bundle: Bundle) -> list[Rounding]:
    return [form.rounding for graph in bundle.manifest.graphs.values() for form in graph.forms if form.rounding]


def _result(bundle: Bundle, out: Path, seconds: float, peak: int | None) -> dict[str, Any]:
    m, files = bundle.manifest, _files(bundle)
    return {
        "bundle": str(out),
        "family": m.family,
        "recipe": m.recipe,
        "licence": m.licence.name,
        "bytes": sum(files.values()),
        "files": files,
        "parity": {spec.file.removesuffix(".onnx"): dataclasses.asdict(parity) for spec, parity in _measured(bundle)},
        "quantisation": m.quantisation and dataclasses.asdict(m.quantisation),
        "utterance": next((dataclasses.asdict(graph.utterance) for graph in m.graphs.values() if graph.utterance), None),
        "codec_int8": next((dataclasses.asdict(rounding) for rounding in _roundings(bundle)), None),
        "seconds": round(seconds, 1),
        "peak_memory_bytes": peak,
    }


def _report(bundle: Bundle, out: Path, seconds: float, peak: int | None) -> list[str]:
    m, files = bundle.manifest, _files(bundle)
    total = size(sum(files.values()))
    lines = [
        *(f"{size(count):>10}  {name}" for name, count in files.items()),
        "-" * 10,
        f"{total:>10}  in {len(files)} files",
        "",
    ]
    if measured := _measured(bundle):
        spec, parity = max(measured, key=lambda found: found[1].max_abs_error / (found[1].tolerance or 1.0))
        name = spec.file.removesuffix(".onnx")
        lines.append(f"verified: {parity.summary(spec)} ({name}; {len(measured)} graphs compared with torch)")
    if m.quantisation:
        lines += [f"quantised: {line}" for line in m.quantisation.summary()]
    lines += [f"latents of an utterance: {graph.utterance.summary()}" for graph in m.graphs.values() if graph.utterance]
    lines += [f"codec: {rounding.summary()}" for rounding in _roundings(bundle)]
    lines.append(f"took {duration(seconds)}, peak memory {size(peak) if peak else 'unknown'}")
    place = shlex.quote(str(out))
    lines += [f"The bundle of {m.family or m.name} ({m.recipe}) is in {out}. Licence of the weights: {m.licence.name}"]
    return [*lines, f'next: fishrt speak --bundle {place} "Hello."']
