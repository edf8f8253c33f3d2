"""Export of a checkpoint folder as a bundle: check it, write and verify each graph, add voices and licence, then the manifest.

All files go into a hidden folder in OUT's parent, which is renamed to OUT when it is complete. The manifest is written last, so
that an interrupted export leaves nothing that loads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fishrt.bundle.features import LanguageModel
from fishrt.bundle.folder import Bundle, describe_files
from fishrt.bundle.manifest import MANIFEST, SCHEMA, Form, Graph, Licence, Manifest
from fishrt.bundle.memory import check_memory
from fishrt.bundle.quantisation import LayerReport, Quantisation
from fishrt.errors import BundleError
from fishrt.progress import Progress
from fishrt.text.tokenizer import Tokenizer
from fishrt.version import __version__

from .checkpoint.families import Family
from .checkpoint.names import DEFAULTS, TOKENIZER, checkpoint_name
from .checkpoint.references import References, check_references, copy_licence, encode_references
from .checkpoint.weights import raise_if_any
from .errors import ExportError
from .graph.job import GraphJob, Made
from .graph.recipe import Recipe, Storage, main_precision
from .options import Options
from .place import check_out, written_aside
from .sources.codec import CodecSource, open_codec
from .sources.codec_start import write_start
from .sources.language_model import LanguageModelSource, open_language_model
from .targets.codec_int8 import check_codec, int8_form
from .targets.coreml import check_codec as check_fixed
from .targets.coreml import static_form, step_usability
from .targets.forms import make_forms
from .targets.tensorrt.rules import errors, tensorrt_findings

log = logging.getLogger(__name__)

BASE_MEMORY = 300_000_000
"""Bytes that tracing and ONNX Runtime take for any model."""

_TRACING = {"codec_encode": 60_000_000, "codec_decode": 150_000_000, "slow_ar": 80_000_000, "fast_ar": 40_000_000}
"""Time to trace each graph of any size, as the number of weights that are written and verified in that time."""


@dataclass(slots=True)
class _Plan:
    """What an export writes, found before anything is written."""

    manifest: Manifest
    """Without what only the written files tell."""
    jobs: list[GraphJob]
    """The portable graphs. A job holds its weights, so it is taken out when it begins."""
    frame: GraphJob | None
    """The frame graph, which is written with the forms of the fast AR."""
    tokenizer: bytes
    family: Family
    references: References | None


def export_bundle(
    checkpoint: str | Path,
    out: str | Path,
    options: Options = Options(),  # noqa: B008  # it is frozen
    *,
    progress: Progress = lambda _stage, _done: None,
) -> Bundle:
    """Export the checkpoint in the folder `checkpoint` as a bundle in the new or empty folder `out`, whose parent exists.

    A language model may have fewer codebooks than the codec. It then speaks with the first ones.

    Raises ExportError for a checkpoint that is incomplete, damaged, mixed or of an unknown family, with a list of all tensors
    that do not fit; for a LoRA of another model; for an `out` that is not empty or cannot be written; for a graph that differs
    from its torch module. Raises FishrtError before anything is written if there is too little memory.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    check_out(out)
    progress("reading the checkpoint", 0.0)
    plan = _planned(checkpoint, out, options)
    storage = {job.role: job.plan for job in plan.jobs}
    with written_aside(out) as folder:
        (folder / TOKENIZER).write_bytes(plan.tokenizer)
        licence = copy_licence(checkpoint, folder, plan.family)
        graphs, errors = _write_graphs(folder, plan, options, progress)
        write_start(folder, graphs["codec_encode"].spec, graphs["codec_decode"].spec, plan.manifest.codec)
        voices = encode_references(plan.references, Bundle(folder, replace(plan.manifest, graphs=graphs)))
        progress("hashing the files", 1.0)
        manifest = replace(
            plan.manifest, graphs=graphs, quantisation=_report(storage, errors), licence=licence, voices=voices
        ).sealed(describe_files(folder))
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        bundle = replace(Bundle.load(folder), path=out)
    _warn_of_tensorrt(bundle)
    return bundle


def _planned(checkpoint: Path, out: Path, options: Options) -> _Plan:
    """Read and check all of the checkpoint. Raises ExportError, and FishrtError if there is too little memory."""
    codec = open_codec(checkpoint)
    language_model = open_language_model(checkpoint, family=options.family, codec=codec.kind, lora=options.lora)
    raise_if_any([*language_model.problems(), *codec.problems()])
    if not halves_fit(language_model, codec):
        raise ExportError(
            f"the language model has {language_model.config.num_codebooks} codebooks "
            f"and the codec has {len(codec.config.codebook_sizes)}",
            hint="take both from one checkpoint",
        )
    recipe = Recipe(options.precision, options.keep)
    jobs = [*_planned_codec(codec, recipe), *_planned_language_model(language_model, options.head, recipe)]
    by_role = {job.role: job for job in jobs}
    if "coreml" in options.targets:
        check_fixed(by_role["codec_decode"].spec)
    if options.codec_int8:
        check_codec(codec.kind)
    manifest = _draft(checkpoint, language_model, codec, jobs, options)
    warn_of_unknown_codes(manifest.language_model, codec.config.codebook_sizes[0])
    framed = not {"cuda", "tensorrt"}.isdisjoint(options.targets)
    frame = language_model.frame_job(manifest.language_model, by_role["fast_ar"].plan) if framed else None
    check_memory(BASE_MEMORY + max(job.need() for job in (*jobs, *filter(None, [frame]))), f"exporting {checkpoint}")
    tokenizer = language_model.tokenizer.encode()
    references = check_references(checkpoint, Bundle(out, manifest), Tokenizer.from_json(tokenizer))
    return _Plan(manifest, jobs, frame, tokenizer, language_model.family, references)


def _draft(
    checkpoint: Path, language_model: LanguageModelSource, codec: CodecSource, jobs: list[GraphJob], options: Options
) -> Manifest:
    """Return the manifest, checked, without what only the written files tell. Raises ExportError."""
    lm, largest = language_model.describe(options.head), max(codec.config.codebook_sizes)
    draft = Manifest(
        schema=SCHEMA,
        name=checkpoint_name(checkpoint),
        exported_by=f"fishrt {__version__}",
        family=language_model.family.title,
        recipe=options.words,
        # Codes that are in no codebook are not drawn.
        model=replace(lm, fast_candidates=min(lm.fast_candidates, largest + lm.code_offset)),
        codec=codec.describe(),
        tokenizer=TOKENIZER,
        graphs={job.role: Graph(job.spec, main_precision(job.plan, _sizes(job)), memory=0) for job in jobs},
        quantisation=None,
        licence=Licence("", None),
        voices=None,
        files={},
    )
    try:
        draft.check()
    except BundleError as error:
        hint = f"take all files from one checkpoint, and mend its {DEFAULTS} if it has one"
        raise ExportError(f"{checkpoint} cannot become a bundle: {error}", hint=hint) from None
    return draft


def _write_graphs(
    folder: Path, plan: _Plan, options: Options, progress: Progress
) -> tuple[dict[str, Graph], dict[str, Mapping[str, float]]]:
    """Write and verify all graphs with their forms. Return them, and the errors of quantised layers, both by role."""
    specs, codec, share = plan.manifest.specs, plan.manifest.codec, 0.6 if options.codec_int8 else 1.0  # of the time
    case, tolerance = next((job.cases[-1], job.tolerance) for job in plan.jobs if job.role == "codec_decode")
    targets = {"cpu", *options.targets}

    def make(folder: Path, role: str) -> list[Form]:
        if plan.frame is None or role != "fast_ar":
            return make_forms(folder, role, specs[role], targets)
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

        forms.insert(0, int8_form(folder, decode, codec.codebook_sizes, show))
    if "coreml" in targets:
        progress("static graphs", share)
        forms.append(static_form(folder, decode, case, tolerance, codec.fingerprint))
        for role in ("slow_ar", "fast_ar"):
            graphs[role] = replace(graphs[role], coreml_step=step_usability(folder, specs[role]))
    graphs["codec_decode"] = replace(graphs["codec_decode"], forms=tuple(forms))
    return graphs, {role: done.errors for role, done in made.items()}


def _warn_of_tensorrt(bundle: Bundle) -> None:
    """Log a warning for each graph that TensorRT refuses. No error: the other engines run it."""
    for role, found in tensorrt_findings(bundle).items():
        if broken := errors(found):
            log.warning("TensorRT would refuse %s: %s; fishrt inspect --trt shows all", role, broken[0])


def halves_fit(language_model: LanguageModelSource, codec: CodecSource) -> bool:
    """Return whether the codec can decode the language model's codes; it also decodes the codes of its first codebooks.

    In 1.2 and 1.4 the numbers must be equal: only they show that the model and the codec are of different releases.
    """
    of_model, of_codec = language_model.config.num_codebooks, len(codec.config.codebook_sizes)
    return of_model == of_codec or (of_model < of_codec and not language_model.family.one_semantic)


def warn_of_unknown_codes(lm: LanguageModel, codes: int) -> None:
    """Log a warning if the codec's first codebook has more entries, `codes`, than the model has semantic tokens."""
    tokens = lm.semantic_end_id - lm.semantic_begin_id + 1
    if lm.code_zero == "main" and codes > tokens:
        log.warning(
            "the codec's first codebook has %d codes, and the language model has tokens for %d: a recording with other codes "
            "cannot become a voice; are the two of one checkpoint?",
            codes,
            tokens,
        )


def _planned_codec(codec: CodecSource, recipe: Recipe) -> list[GraphJob]:
    plan = recipe.codec_plan(codec.weights)
    return [replace(job, plan=plan) for job in codec.jobs()]


def _planned_language_model(language_model: LanguageModelSource, head: str, recipe: Recipe) -> list[GraphJob]:
    jobs = language_model.jobs(head)
    plans = recipe.plan({job.role: job.build() for job in jobs}, {job.role: job.weights for job in jobs})
    return [replace(job, plan=plans[job.role]) for job in jobs]


def _sizes(job: GraphJob) -> dict[str, int]:
    """Return the number of elements of each weight."""
    return {name: tensor.numel() for name, tensor in job.build().state_dict().items()}


def _run(jobs: list[GraphJob], folder: Path, make: Callable[[Path, str], list[Form]], progress: Progress) -> dict[str, Made]:
    """Write and verify all graphs with their forms, with progress in proportion to time. Empties `jobs`: weights are freed."""
    sizes = {job.role: sum(_sizes(job).values()) for job in jobs}
    total, before = sum(sizes.values()) + sum(_TRACING[role] for role in sizes), 0
    made = {}
    while jobs:
        job = jobs.pop(0)
        role, size = job.role, sizes[job.role]

        def report(stage: str, part: float, role: str = role, size: int = size, before: int = before) -> None:
            progress(f"{role}: {stage}", (before + (_TRACING[role] if stage != "tracing" else 0) + part * size) / total)

        made[role] = job.run(folder, report, partial(make, folder, role))
        before += size + _TRACING[role]
    return made


def _report(plans: Mapping[str, Mapping[str, Storage]], errors: Mapping[str, Mapping[str, float]]) -> Quantisation | None:
    """Return the precision and error of each layer of the language model; None if no layer is quantised."""
    layers = tuple(
        LayerReport(
            f"{role}.{name.removesuffix('.weight')}",
            storage.precision,
            storage.block,
            errors[role].get(name, 0.0),
            storage.reason,
        )
        for role in ("slow_ar", "fast_ar")
        for name, storage in plans[role].items()
    )
    return Quantisation(layers) if any(layer.block for layer in layers) else None
