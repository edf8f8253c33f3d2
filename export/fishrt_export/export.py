"""Export of a checkpoint folder as a bundle: check it, write and verify each graph, add voices and licence, then the manifest.

All files go into a hidden folder in OUT's parent, which is renamed to OUT when it is complete. The manifest is written last, so
that an interrupted export leaves nothing that loads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from fishrt.bundle.folder import Bundle, describe_files
from fishrt.bundle.manifest import MANIFEST, Form, Graph
from fishrt.bundle.quantisation import LayerReport, Quantisation
from fishrt.progress import Progress

from .checkpoint.diffusion.files import is_diffusion
from .checkpoint.names import TOKENIZER
from .checkpoint.references import copy_licence, encode_references
from .graph.job import GraphJob, Made
from .graph.recipe import Storage
from .graph.utterance import utterance_error
from .options import Options
from .place import check_out, written_aside
from .planning.diffusion import plan_diffusion
from .planning.dual_ar import plan_dual_ar
from .planning.plan import Plan, sizes
from .sources.codec_start import write_start
from .targets.codec.int8 import int8_form
from .targets.coreml import static_form, step_usability
from .targets.forms import make_forms
from .targets.tensorrt.rules import errors, tensorrt_findings

log = logging.getLogger(__name__)

_TRACING = {
    **{"codec_encode": 60_000_000, "codec_decode": 150_000_000, "slow_ar": 80_000_000, "fast_ar": 40_000_000},
    **{"text_cond": 80_000_000, "speaker_cond": 80_000_000, "latent_cond": 80_000_000, "schedule": 30_000_000},
    "denoise": 200_000_000,
}
"""Time to trace each graph of any size, as the number of weights that are written and verified in that time."""


def export_bundle(
    checkpoint: str | Path,
    out: str | Path,
    options: Options = Options(),  # noqa: B008  # it is frozen
    *,
    progress: Progress = lambda _stage, _done: None,
) -> Bundle:
    """Export a checkpoint as a bundle in the new or empty folder `out`, whose parent exists.

    checkpoint: its folder, or the file of its weights in a folder with the rest. A language model may have fewer codebooks than
    the codec. It then speaks with the first ones.

    Raises ExportError for a checkpoint that is incomplete, damaged, mixed or of an unknown family, with a list of all tensors
    that do not fit; for a LoRA of another model; for an `out` that is not empty or cannot be written; for a graph that differs
    from its torch module. Raises FishrtError before anything is written if there is too little memory.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    check_out(out)
    if checkpoint.is_file():
        checkpoint, options = checkpoint.parent, replace(options, weights=checkpoint)
    progress("reading the checkpoint", 0.0)
    diffusion = is_diffusion(checkpoint)
    plan = (plan_diffusion if diffusion else plan_dual_ar)(checkpoint, out, options)
    storage = {job.role: job.plan for job in plan.jobs}
    # Jobs hold weights: those of a diffusion model are files, which are read when they are looked up.
    jobs = {job.role: job for job in plan.jobs if diffusion and not job.role.startswith("codec")}
    rounded = any(stored.precision != "fp32" for role in jobs for stored in storage[role].values())
    share = 0.95 if rounded else 1.0  # of the time
    with written_aside(out) as folder:
        if plan.tokenizer is not None:
            (folder / TOKENIZER).write_bytes(plan.tokenizer)
        licence = copy_licence(checkpoint, folder, plan.release)
        graphs, errors = _write_graphs(folder, plan, options, lambda stage, part: progress(stage, share * part))
        write_start(folder, graphs["codec_encode"].spec, graphs["codec_decode"].spec, plan.manifest.codec)
        if rounded:
            progress("latents of an utterance", share)
            error = utterance_error(jobs, Bundle(folder, replace(plan.manifest, graphs=graphs)))
            graphs["denoise"] = replace(graphs["denoise"], utterance=error)
        voices = encode_references(plan.references, Bundle(folder, replace(plan.manifest, graphs=graphs)))
        progress("hashing the files", 1.0)
        manifest = replace(
            plan.manifest, graphs=graphs, quantisation=_report(storage, errors), licence=licence, voices=voices
        ).sealed(describe_files(folder))
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        bundle = replace(Bundle.load(folder), path=out)
    _warn_of_tensorrt(bundle)
    return bundle


def _write_graphs(
    folder: Path, plan: Plan, options: Options, progress: Progress
) -> tuple[dict[str, Graph], dict[str, Mapping[str, float]]]:
    """Write and verify all graphs with their forms. Return them, and the errors of quantised layers, both by role."""
    specs, codec, share = plan.manifest.specs, plan.manifest.codec, 0.6 if options.codec_int8 else 1.0  # of the time
    case, tolerance = next((job.cases[-1], job.tolerance) for job in plan.jobs if job.role == "codec_decode")
    targets = {"cpu", *options.targets}

    def make(folder: Path, role: str) -> list[Form]:
        if plan.frame is None or role != "fast_ar":
            return make_forms(folder, role, specs[role], targets, hop=codec.hop)
        whole = Form("tensorrt", plan.frame.spec, parity=plan.frame.run(folder).parity)
        return [*make_forms(folder, role, specs[role], targets, whole), whole]

    made = _run(plan.jobs, folder, make, lambda stage, part: progress(stage, share * part))
    graphs = {
        role: replace(graph, memory=made[role].memory, parity=made[role].parity, forms=made[role].forms)
        for role, graph in plan.manifest.graphs.items()
    }
    decode, forms = specs["codec_decode"], list(graphs["codec_decode"].forms)
    if options.codec_int8:

        def show(part: float) -> None:
            progress("codec in 8 bits", share + (1 - share) * part)

        forms.insert(0, int8_form(folder, decode, codec.codebook_sizes, codec.hop, show))
    if "coreml" in targets:
        progress("static graphs", share)
        forms.append(static_form(folder, decode, case, tolerance, codec.fingerprint))
        for role in {"slow_ar", "fast_ar"} & graphs.keys():
            graphs[role] = replace(graphs[role], coreml_step=step_usability(folder, specs[role]))
    graphs["codec_decode"] = replace(graphs["codec_decode"], forms=tuple(forms))
    return graphs, {role: done.errors for role, done in made.items()}


def _warn_of_tensorrt(bundle: Bundle) -> None:
    """Log a warning for each graph that TensorRT refuses. No error: the other engines run it."""
    for role, found in tensorrt_findings(bundle).items():
        if broken := errors(found):
            log.warning("TensorRT would refuse %s: %s; fishrt inspect --trt shows all", role, broken[0])


def _run(jobs: list[GraphJob], folder: Path, make: Callable[[Path, str], list[Form]], progress: Progress) -> dict[str, Made]:
    """Write and verify all graphs with their forms, with progress in proportion to time. Empties `jobs`: weights are freed."""
    counts = {job.role: sum(sizes(job.build()).values()) for job in jobs}
    total, before = sum(counts.values()) + sum(_TRACING[role] for role in counts), 0
    made = {}
    while jobs:
        job = jobs.pop(0)
        role, size = job.role, counts[job.role]

        def report(stage: str, part: float, role: str = role, size: int = size, before: int = before) -> None:
            progress(f"{role}: {stage}", (before + (_TRACING[role] if stage != "tracing" else 0) + part * size) / total)

        made[role] = job.run(folder, report, partial(make, folder, role))
        before += size + _TRACING[role]
    return made


def _report(plans: Mapping[str, Mapping[str, Storage]], errors: Mapping[str, Mapping[str, float]]) -> Quantisation | None:
    """Return the precision and error of each layer of the model; None if no layer is quantised."""
    layers = tuple(
        LayerReport(
            f"{role}.{name.removesuffix('.weight')}",
            storage.precision,
            storage.block,
            errors[role].get(name, 0.0),
            storage.reason,
        )
        for role, plan in plans.items()
        if not role.startswith("codec")
        for name, storage in plan.items()
    )
    return Quantisation(layers) if any(layer.block for layer in layers) else None
