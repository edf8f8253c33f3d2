"""`fishrt export`, `inspect` and `doctor`: making a bundle, looking at one, and looking at this machine."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from fishrt_engines.machine import peak_memory
from fishrt_engines.trt_rules import Finding, errors

from ..bundle import PRECISIONS, Bundle
from ..conformance import tensorrt_findings
from ..errors import BundleError, FishrtError
from ..int8_codec import read_int8_codec
from ..memory import CACHE_POSITIONS, estimate
from ..quantisation import read_quantisation
from ..static import read_static
from ..voices import user_folder
from .base import Number, Whole, json_option, load_bundle, quiet_option
from .commands import print_json
from .progress import Reporter
from .streams import emit

_EXPORT_NEEDS = ("torch", "onnx", "onnxscript", "onnx_ir", "safetensors", "onnxruntime")


class _ExportCommand(click.Command):
    """Its help ends with the checkpoints that the exporter knows."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from fishrt_export.families import FAMILIES

        with formatter.section("Official checkpoints, by their names on Hugging Face"):
            formatter.write_dl([(f.repository, f"{f.files} (family {f.name})") for f in FAMILIES.values()])


def _parse_keep(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """NAME=PRECISION by name. What is in them is for the exporter to judge."""
    pairs = [value.rpartition("=") for value in values]
    if wrong := [value for value, (name, _, _) in zip(values, pairs, strict=True) if not name]:
        raise click.BadParameter(f"{wrong[0]!r} is not NAME=PRECISION")
    return {name: precision for name, _, precision in pairs}


@click.command(cls=_ExportCommand, short_help="Turn the weights of an official model into a bundle.")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--head",
    type=click.Choice(["audio", "full"]),
    default="audio",
    show_default=True,
    help="Logits of the slow AR: of what can be spoken, or of the whole vocabulary (larger and slower; for comparisons).",
)
@click.option("--family", metavar="NAME", help="Take the checkpoint for one of this family, in place of finding it out.")
@click.option("--lora", type=click.Path(path_type=Path), metavar="FILE", help="Merge the LoRA of a fine-tuning into the model.")
@click.option(
    "--lora-alpha", type=Number(min=0, min_open=True), metavar="A", help="Its alpha, which no file tells: r_8_alpha_16 means 16."
)
@click.option("--lora-rank", type=Whole(min=1), metavar="R", help="What its rank must be.  [default: as it is found]")
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="fp32",
    show_default=True,
    help="How weights are stored. fp32: as they are, fp16: rounded to 16 bits, int8: linear layers of the language model in "
    "8 bits, int4: the same, but the slow AR's blocks in 4.",
)
@click.option(
    "--keep",
    metavar="NAME=PRECISION",
    multiple=True,
    callback=_parse_keep,
    help="Another precision for some layers, such as 'slow_ar.layers.0.*=int8' or fast_ar.output=fp32. Can be repeated.",
)
@click.option(
    "--static",
    type=click.Choice(["coreml"]),
    help="Also add codec graphs of fixed sizes, for provider coreml on macOS. The language model runs on the CPU there.",
)
@click.option(
    "--codec-int8",
    is_flag=True,
    help="Also add the codec's decoder with most convolutions in 8 bits, which CPUs with VNNI then use: faster, with a little "
    "more noise. Only for codecs of the kind DAC.",
)
@quiet_option
@json_option
def export(
    checkpoint: Path,
    out: Path,
    head: str,
    family: str | None,
    lora: Path | None,
    lora_alpha: float | None,
    lora_rank: int | None,
    precision: str,
    keep: dict[str, str],
    static: str | None,
    codec_int8: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Turn an official CHECKPOINT folder into the bundle OUT, and prove its graphs equal to the torch modules.

    Needs torch: pip install "fishrt[export]". Nothing is left behind when it fails or is interrupted.
    """
    if lora is None and (lora_alpha is not None or lora_rank is not None):
        raise click.UsageError(f"{'--lora-rank' if lora_alpha is None else '--lora-alpha'} needs --lora")
    if lora is not None and lora_alpha is None:
        raise click.UsageError("--lora needs --lora-alpha: no file tells it")
    reporter = Reporter(quiet=quiet or as_json)
    try:
        from fishrt_export import Lora, export_bundle

        bundle = export_bundle(
            checkpoint,
            out,
            head=head,
            family=family,
            lora=None if lora is None or lora_alpha is None else Lora(lora, lora_alpha, lora_rank),
            precision=precision,
            keep=keep,
            static=static,
            codec_int8=codec_int8,
            progress=reporter.show,
        )
    except ImportError as error:
        if (error.name or "").split(".")[0] not in _EXPORT_NEEDS:
            raise
        raise FishrtError(f"exporting needs {error.name}, which is not installed", hint='pip install "fishrt[export]"') from None
    peak = peak_memory()
    if as_json:
        print_json({"command": "export", "bundle": str(out), "bytes": bundle.manifest.total_bytes, "peak_memory_bytes": peak})
        return
    for name, entry in bundle.manifest.files.items():
        reporter.done(f"{_size(entry.bytes):>10}  {name}")
    reporter.done(f"{_size(bundle.manifest.total_bytes):>10}  {out}")
    if report := read_quantisation(bundle):
        reporter.done("\n".join(report.summary()))
    if decoder := read_int8_codec(bundle):
        reporter.done(decoder.summary())
    reporter.done(f"peak memory {_size(peak)}" if peak else "peak memory unknown")


@click.command(short_help="Show what is in a bundle, and check it.")
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Hash every file and compare with the manifest.")
@click.option("--trt", is_flag=True, help="Check every graph against the documented rules of TensorRT's ONNX importer.")
@quiet_option
@json_option
def inspect(bundle: Path | None, verify: bool, trt: bool, quiet: bool, as_json: bool) -> None:
    """Show what is in BUNDLE (default: the embedded voice): graphs, tensors, sizes, precision, parity, licence, voices, and the
    memory that it needs.
    """
    loaded = load_bundle(bundle)
    if verify:
        _verify(loaded, quiet=quiet or as_json)
    findings = tensorrt_findings(loaded) if trt else {}
    if as_json:
        print_json(
            {
                "command": "inspect",
                "path": str(loaded.path),
                "verified": verify,
                "memory_need": dataclasses.asdict(estimate(loaded.manifest)),
                "tensorrt": {role: list(map(dataclasses.asdict, found)) for role, found in findings.items()} if trt else None,
                "manifest": dataclasses.asdict(loaded.manifest),
            }
        )
        return
    emit("\n".join(_describe(loaded)))
    if verify:
        emit("verified      every file has the SHA-256 of the manifest")
    if trt:
        emit("\n".join(_tensorrt(findings)))


@click.command(short_help="Show what this machine can do.")
@json_option
def doctor(as_json: bool) -> None:
    """Show what this machine can do: CPU, memory, NVIDIA devices, versions, audio formats, the embedded voice; which execution
    providers can run here, what is missing for the others, and which one `auto` takes.
    """
    from fishrt_engines.doctor import examine

    found = examine()
    rest = {
        "voices": str(user_folder() or "no folder: this user has no home, and FISHRT_VOICE_DIR is not set"),
        "audio formats": _audio_formats(),
        "torch for export": _torch(),
        "embedded voice": _embedded(),
    }
    if as_json:
        names = {name.replace(" ", "_"): text for name, text in rest.items()}
        print_json({"command": "doctor", **dataclasses.asdict(found), **names})
        return
    emit("\n".join([*found.lines(), *(f"{name}: {text}" for name, text in rest.items())]))


def _verify(bundle: Bundle, *, quiet: bool) -> None:
    reporter, total, read = Reporter(quiet=quiet), bundle.manifest.total_bytes, 0

    def show(count: int) -> None:
        nonlocal read
        read += count
        reporter.show("hashing", read / total)

    bundle.verify(show)
    reporter.clear()


def _describe(bundle: Bundle) -> list[str]:
    m, lm, codec = bundle.manifest, bundle.manifest.language_model, bundle.manifest.codec
    s, need = lm.sampling, estimate(m)
    sampling = f"temperature {s.temperature:g}, top-p {s.top_p:g}, top-k {s.top_k or 'off'}"
    if ras := s.repetition_aware:
        sampling += f"; repeats within {ras.window} frames drawn again at temperature {ras.temperature:g}, top-p {ras.top_p:g}"
    if penalty := s.repetition_penalty:
        sampling += f"; what the last {penalty.window} frames drew penalised by {penalty.penalty:g}"
    lines = [
        f"bundle        {m.name}",
        f"path          {bundle.path}",
        f"size          {_size(m.total_bytes)} in {len(m.files)} files",
        f"exported by   {m.exported_by} (schema {m.schema})",
        f"memory        {_size(need.speaking)} of weights to speak, {_size(need.encoding)} more to make voices",
        f"              {_size(need.cache)} for {CACHE_POSITIONS:,} positions of context, {_size(need.state)} for other state",
        f"licence       {m.licence.name}" + (f" ({m.licence.file})" if m.licence.file else ""),
        f"precision     {', '.join(f'{role} {precision}' for role, precision in m.precision.items())}",
        f"prompts       {lm.prompt_dialect}; context {lm.max_seq_len:,} positions; pieces of about {lm.chunk_bytes} bytes",
        f"speaks        {lm.num_codebooks} codebooks of {lm.codebook_width:,}; vocabulary {lm.vocab_size:,}; {lm.head} head",
        f"sampling      {sampling}",
        f"codec         {codec.sample_rate:,} Hz, {codec.frame_rate:.2f} frames/s, at most {codec.max_frames:,} frames",
        f"              codebooks {', '.join(f'{size:,}' for size in codec.codebook_sizes)}",
        f"              fingerprint {codec.fingerprint}",
        f"voices        {', '.join(m.voices.names) + f' (default {m.voices.default})' if m.voices else 'none'}",
    ]
    if report := read_quantisation(bundle):
        lines += [f"{'' if n else 'quantised':<14}{line}" for n, line in enumerate(report.summary())]
    if decoder := read_int8_codec(bundle):
        lines.append(f"codec int8    {decoder.summary()}")
    if static := read_static(bundle):
        lines += [f"{'' if n else static.target:<14}{line}" for n, line in enumerate(static.summary())]
    for role, graph in m.graphs.items():
        size = sum(entry.bytes for name, entry in m.files.items() if name.startswith(graph.file))
        lines += ["", f"graph {role}: {graph.file}, {_size(size)}"]
        if parity := m.parity.get(role):
            lines.append(
                f"  largest error {parity.max_abs_error:.2g} of {parity.tolerance:g} allowed, against torch, on {parity.provider}"
            )
        carried = {pair.input for pair in graph.states} | {pair.output for pair in graph.states}
        for arrow, tensors in (("in ", graph.inputs), ("out", graph.outputs)):
            lines += [f"  {arrow} {t.name} {t.dtype} [{', '.join(map(str, t.shape))}]" for t in tensors if t.name not in carried]
        if states := graph.state_tensors:
            shape = ", ".join(map(str, states[0].shape))
            lines.append(f"  state of {len(states)} tensors, {states[0].name} {states[0].dtype} [{shape}], …")
    return lines


def _tensorrt(findings: Mapping[str, list[Finding]]) -> list[str]:
    lines = ["", "TensorRT, by the documented rules of its importer; it was not asked itself"]
    for role, found in findings.items():
        lines.append(f"  {role}: errors: {len(errors(found)) or 'none'}")
        alike: dict[Finding, list[Finding]] = {}
        for finding in found:
            alike.setdefault(dataclasses.replace(finding, node=""), []).append(finding)
        lines += [f"    {first}" + (f", and {len(others)} alike" if others else "") for first, *others in alike.values()]
    return lines


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def _audio_formats() -> str:
    try:
        import soundfile
    except (ImportError, OSError) as error:
        return f"soundfile cannot be loaded: {error}"
    known: dict[str, Any] = soundfile.available_formats()
    return (
        ", ".join(name for name in ("WAV", "FLAC", "OGG", "MP3", "AIFF") if name in known)
        + f" ({soundfile.__libsndfile_version__})"
    )


def _torch() -> str:
    if importlib.util.find_spec("torch") is None:
        return 'not installed (pip install "fishrt[export]"; speaking does not need it)'
    return importlib.metadata.version("torch")


def _embedded() -> str:
    try:
        bundle = load_bundle(None)
        bundle.verify()
    except BundleError as error:
        return f"not usable: {error}"
    return f"ok, {bundle.manifest.name}, {_size(bundle.manifest.total_bytes)}"
