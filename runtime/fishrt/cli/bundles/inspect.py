"""`fishrt inspect`: the content of a bundle, or of a checkpoint before its export."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ...bundle.diffusion import Diffusion
from ...bundle.features import Codec, LanguageModel
from ...bundle.folder import Bundle
from ...bundle.manifest import MANIFEST, Manifest
from ...bundle.memory import CACHE_POSITIONS, estimate
from ...hub.repository import is_reference
from ...progress import size
from ..base.commands import print_json
from ..base.options import json_option, load_bundle, needs_onnx, quiet_option
from ..base.progress import Reporter
from ..base.streams import emit


@click.command(short_help="Show what is in a bundle or a checkpoint, and check it.")
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Compare the SHA-256 of every file with the manifest.")
@click.option("--trt", is_flag=True, help="Check every graph against the documented rules of TensorRT's ONNX importer.")
@quiet_option
@json_option
def inspect(bundle: Path | None, verify: bool, trt: bool, quiet: bool, as_json: bool) -> None:
    """Show what is in BUNDLE: family, recipe, licence, memory that it needs, precision, voices, graphs and their measured errors.

    BUNDLE is a folder, or hf:OWNER/NAME of the Hugging Face Hub.  [default: the embedded voice]

    Of the folder of a checkpoint or a file of weights: its form, what is quantised, family, licence, what is missing, and what
    `fishrt export` makes of it. The weights are not read.
    """
    if bundle is not None and not is_reference(bundle) and (found := _checkpoint(bundle)):
        if verify or trt:
            raise click.UsageError(f"--{'verify' if verify else 'trt'} is for bundles, and {bundle} is a checkpoint")
        print_json(dataclasses.asdict(found)) if as_json else emit("\n".join(found.lines(size(found.bytes))))
        return
    loaded = load_bundle(bundle)
    if verify:
        _verify(loaded, quiet=quiet or as_json)
    findings: Mapping[str, list[Any]] = {}
    if trt:
        with needs_onnx("inspect --trt"):
            from fishrt_export.targets.tensorrt.rules import tensorrt_findings

        findings = tensorrt_findings(loaded)
    if as_json:
        print_json(
            {
                "path": str(loaded.path),
                "verified": verify,
                "memory_need": dataclasses.asdict(estimate(loaded.manifest)),
                "quantisation": (report := loaded.manifest.quantisation) and dataclasses.asdict(report),
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


def _checkpoint(path: Path) -> Any:
    """Return the exporter's description of a checkpoint; None for a bundle, or a path with neither."""
    from fishrt_export.checkpoint.forms.describe import describe, is_checkpoint

    if (path / MANIFEST).is_file() or not is_checkpoint(path):
        return None
    return describe(path)


def _verify(bundle: Bundle, *, quiet: bool) -> None:
    reporter, total, read = Reporter(quiet=quiet), bundle.manifest.total_bytes, 0

    def show(count: int) -> None:
        nonlocal read
        read += count
        reporter.show("hashing", read / total)

    bundle.verify(show)
    reporter.clear()


def _describe(bundle: Bundle) -> list[str]:
    m, codec, need = bundle.manifest, bundle.manifest.codec, estimate(bundle.manifest)
    report = m.quantisation
    stored = {role: (report and report.precisions(role)) or graph.precision for role, graph in m.graphs.items()}
    lines = [
        f"bundle        {m.name}",
        f"family        {m.family}",
        f"recipe        {m.recipe}",
        f"path          {bundle.path}",
        f"size          {size(m.total_bytes)} in {len(m.files)} files, without manifest.json",
        f"exported by   {m.exported_by} (schema {m.schema})",
        f"memory        {size(need.speaking)} of weights to speak, {size(need.encoding)} more to make voices",
        f"              {size(need.cache)} for {CACHE_POSITIONS:,} positions of context, {size(need.state)} for other state",
        f"licence       {m.licence.name}" + (f" ({m.licence.file})" if m.licence.file else ""),
        f"precision     {'; '.join(f'{role} {stored[role]}' for role in m.graphs)}",
        *(_language_model(m.model) if isinstance(m.model, LanguageModel) else _diffusion(m.model, codec)),
        f"codec         {codec.sample_rate:,} Hz, {codec.frame_rate:.2f} frames/s, at most {codec.max_frames:,} frames",
        f"              codebooks {', '.join(f'{size:,}' for size in codec.codebook_sizes)}"
        if codec.channels is None
        else f"              latents of {codec.channels} channels",
        f"              fingerprint {codec.fingerprint}",
        f"voices        {', '.join(m.voices.names) + f' (default {m.voices.default})' if m.voices else 'none'}",
    ]
    if report:
        lines += [f"{'' if n else 'quantised':<14}{line}" for n, line in enumerate(report.summary())]
    lines += [f"{'' if n else 'coreml':<14}{line}" for n, line in enumerate(_coreml(m))]
    for role, graph in m.graphs.items():
        spec = graph.spec
        lines += ["", f"graph {role}: {spec.file}, {_graph_size(m, spec.file)}"]
        if graph.parity:
            lines.append(f"  compared with torch, on {graph.parity.provider}: {graph.parity.summary(spec)}")
        if graph.utterance:
            lines.append(f"  latents of an utterance, on {graph.utterance.provider}: {graph.utterance.summary()}")
        carried = {pair.input for pair in spec.states} | {pair.output for pair in spec.states}
        for arrow, tensors in (("in ", spec.inputs), ("out", spec.outputs)):
            lines += [f"  {arrow} {t.name} {t.dtype} [{', '.join(map(str, t.shape))}]" for t in tensors if t.name not in carried]
        if states := spec.state_tensors:
            shape = ", ".join(map(str, states[0].shape))
            lines.append(f"  state of {len(states)} tensors, {states[0].name} {states[0].dtype} [{shape}], …")
        for form in graph.forms:
            needs = f" with {' and '.join(form.needs)}" if form.needs else ""
            for file in form.files:
                lines.append(f"  form for {form.provider}{needs}: {file}, {_graph_size(m, file)}")
            if form.parity:
                lines.append(f"    compared with torch, on {form.parity.provider}: {form.parity.summary(form.spec)}")
            elif form.parts:
                worst = max((part.parity for part in form.parts), key=lambda parity: parity.max_abs_error)
                lines.append(f"    compared with the portable graph, on {worst.provider}: {worst.summary(form.spec)}")
            elif not form.rounding:
                lines.append("    not compared with torch: no CPU can run it")
            if form.convolutions:
                lines.append(f"    convolutions: {', '.join(f'{count} as {how}' for how, count in form.convolutions.items())}")
            if form.rounding:
                lines.append(f"    {form.rounding.summary()}")
    return lines


def _coreml(manifest: Manifest) -> list[str]:
    """Return the usability checker's results for graphs of fixed sizes."""
    found = [
        (f"{role}, {part.frames:,} frame{'' if part.frames == 1 else 's'}", part.usability)
        for role, graph in manifest.graphs.items()
        for form in graph.forms
        for part in form.parts
    ]
    found += [
        (f"{role}, one column (not in the bundle)", graph.coreml_step)
        for role, graph in manifest.graphs.items()
        if graph.coreml_step
    ]
    return [f"{name}: {u.covered} of {u.nodes} nodes in {u.partitions} partitions, {u.verdict}" for name, u in found]


def _graph_size(manifest: Manifest, file: str) -> str:
    """Return the size of a graph with its weights."""
    return size(sum(entry.bytes for name, entry in manifest.files.items() if name in (file, f"{file}.data")))


def _language_model(lm: LanguageModel) -> list[str]:
    s = lm.sampling
    sampling = f"temperature {s.temperature:g}, top-p {s.top_p:g}, top-k {s.top_k or 'off'}"
    if ras := s.repetition_aware:
        sampling += f"; repeats within {ras.window} frames drawn again at temperature {ras.temperature:g}, top-p {ras.top_p:g}"
    if penalty := s.repetition_penalty:
        sampling += f"; repetition penalty {penalty.penalty:g} over the last {penalty.window} frames"
    return [
        f"prompts       {lm.prompt_dialect}; context {lm.max_seq_len:,} positions; pieces of about {lm.chunk_bytes} bytes",
        f"speaks        {lm.num_codebooks} codebooks of {lm.codebook_width:,}; vocabulary {lm.vocab_size:,}; {lm.head} head",
        f"sampling      {sampling}",
    ]


def _diffusion(model: Diffusion, codec: Codec) -> list[str]:
    d = model.denoising
    guided = f"guidance by text {d.cfg_text:g}, by voice {d.cfg_speaker:g}, for t from {d.cfg_min_t:g} to {d.cfg_max_t:g}"
    most = model.max_frames / codec.frame_rate
    return [
        f"texts         at most {model.max_tokens:,} bytes; voices of at most {model.max_voice_frames / codec.frame_rate:.0f} s",
        f"speaks        at most {most:.1f} s at once, {'in blocks or whole' if model.blockwise else 'as a whole, not in blocks'}",
        f"denoising     {d.steps} steps; {guided}",
    ]


def _tensorrt(findings: Mapping[str, list[Any]]) -> list[str]:
    """Return lines about findings: see `fishrt_export.targets.tensorrt.rules.Finding`."""
    lines = ["", "TensorRT, by the documented rules of its importer; TensorRT itself did not run"]
    for role, found in findings.items():
        lines.append(f"  {role}: errors: {sum(f.severity == 'error' for f in found) or 'none'}")
        alike: dict[Any, list[Any]] = {}
        for finding in found:
            alike.setdefault(dataclasses.replace(finding, node=""), []).append(finding)
        lines += [f"    {first}" + (f", and {len(others)} more like it" if others else "") for first, *others in alike.values()]
    return lines
