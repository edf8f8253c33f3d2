"""Export of a checkpoint folder as a bundle: check it, write and verify each graph, add voices and licence, then the manifest.

All files go into a hidden folder in OUT's parent, which is renamed to OUT when it is complete. The manifest is written last, so
that an interrupted export leaves nothing that loads.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from fishrt.audio.output import check_place
from fishrt.bundle.features import LanguageModel
from fishrt.bundle.folder import Bundle, describe_files
from fishrt.bundle.manifest import MANIFEST, SCHEMA, Form, Graph, Licence, Manifest
from fishrt.bundle.memory import check_memory
from fishrt.bundle.quantisation import LayerReport, Quantisation
from fishrt.errors import BundleError
from fishrt.progress import Progress
from fishrt.text.tokenizer import Tokenizer
from fishrt.version import __version__
from fishrt_engines.aside import new_folder

from .checkpoint.lora import Lora
from .checkpoint.names import DEFAULTS, TOKENIZER, checkpoint_name
from .checkpoint.references import check_references, copy_licence, encode_references
from .checkpoint.weights import raise_if_any
from .errors import ExportError
from .graph.job import GraphJob, Made
from .graph.recipe import Recipe, Storage, main_precision
from .sources.codec import CodecSource, open_codec
from .sources.codec_start import write_start
from .sources.language_model import LanguageModelSource, open_language_model
from .targets.codec_int8 import check_codec, int8_form
from .targets.coreml import check_codec as check_fixed
from .targets.coreml import static_form, step_usability
from .targets.forms import check_targets, make_forms
from .targets.tensorrt.rules import errors, tensorrt_findings

log = logging.getLogger(__name__)

BASE_MEMORY = 300_000_000
"""Bytes that tracing and ONNX Runtime take for any model."""

_TRACING = {"codec_encode": 60_000_000, "codec_decode": 150_000_000, "slow_ar": 80_000_000, "fast_ar": 40_000_000}
"""Time to trace each graph of any size, as the number of weights that are written and verified in that time."""


def export_bundle(
    checkpoint: str | Path,
    out: str | Path,
    *,
    head: str = "audio",
    family: str | None = None,
    lora: Lora | None = None,
    precision: str = "fp32",
    keep: Mapping[str, str] | None = None,
    targets: Collection[str] = (),
    codec_int8: bool = False,
    progress: Progress = lambda _stage, _done: None,
) -> Bundle:
    """Export the checkpoint in the folder `checkpoint` as a bundle in the new or empty folder `out`, whose parent exists.

    A language model may have fewer codebooks than the codec. It then speaks with the first ones.

    head: "audio" keeps the logits of the tokens that can be spoken, "full" those of the whole vocabulary.
    family: a key of families.FAMILIES; None identifies it. lora: merged into the language model.
    precision, keep: see recipe.Recipe.
    targets: providers for which forms of the graphs are made, of forms.TARGETS; those for "cpu" are always made.
    codec_int8: also add the codec's decoder with convolutions in 8 bits; see codec_int8.py.
    Raises ExportError for a checkpoint that is incomplete, damaged, mixed or of an unknown family, with a list of all tensors
    that do not fit; for a LoRA of another model; for an `out` that is not empty or cannot be written; for a graph that differs
    from its torch module. Raises FishrtError before anything is written if there is too little memory.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    recipe = Recipe(precision, keep or {})
    targets = dict.fromkeys(("cpu", *targets))
    check_targets(targets)
    check_out(out)
    progress("reading the checkpoint", 0.0)
    codec = open_codec(checkpoint)
    language_model = open_language_model(checkpoint, family=family, codec=codec.kind, lora=lora)
    raise_if_any([*language_model.problems(), *codec.problems()])
    if not halves_fit(language_model, codec):
        raise ExportError(
            f"the language model has {language_model.config.num_codebooks} codebooks "
            f"and the codec has {len(codec.config.codebook_sizes)}",
            hint="take both from one checkpoint",
        )
    jobs = [*_planned_codec(codec, recipe), *_planned_language_model(language_model, head, recipe)]
    described, largest = language_model.describe(head), max(codec.config.codebook_sizes)
    warn_of_unknown_codes(described, codec.config.codebook_sizes[0])
    tokenizer = language_model.tokenizer
    draft = Manifest(
        schema=SCHEMA,
        name=checkpoint_name(checkpoint),
        exported_by=f"fishrt {__version__}",
        family=language_model.family.title,
        recipe=_recipe_words(recipe, head=head, lora=lora, targets=targets, codec_int8=codec_int8),
        # Codes that are in no codebook are not drawn.
        model=replace(described, fast_candidates=min(described.fast_candidates, largest + described.code_offset)),
        codec=codec.describe(),
        tokenizer=TOKENIZER,
        graphs={job.role: Graph(job.spec, main_precision(job.plan, _sizes(job)), memory=0) for job in jobs},
        # Memory and the fields below are replaced when the files are written.
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
    decode = next(job for job in jobs if job.role == "codec_decode")
    if "coreml" in targets:
        check_fixed(decode.spec)
    if codec_int8:
        check_codec(codec.kind)
    static_case, static_tolerance = decode.cases[-1], decode.tolerance
    del decode
    plans, known = {job.role: job.plan for job in jobs}, language_model.family
    framed = {"cuda", "tensorrt"} & targets.keys()
    frame = language_model.frame_job(draft.model, plans["fast_ar"]) if framed else None
    check_memory(BASE_MEMORY + max(job.need() for job in (*jobs, *filter(None, [frame]))), f"exporting {checkpoint}")
    del codec, language_model  # each job holds its weights until it is done
    references = check_references(checkpoint, Bundle(out, draft), Tokenizer.from_json(tokenizer.encode()))
    with _written_aside(out) as folder:
        (folder / TOKENIZER).write_bytes(tokenizer.encode())
        licence = copy_licence(checkpoint, folder, known)
        graphs = 0.6 if codec_int8 else 1.0  # part of the export's time

        def make(folder: Path, role: str) -> list[Form]:
            if frame is None or role != "fast_ar":
                return make_forms(folder, role, draft.specs[role], targets)
            whole = Form("tensorrt", frame.spec, parity=frame.run(folder).parity)
            return [*make_forms(folder, role, draft.specs[role], targets, whole), whole]

        made = _run(jobs, folder, make, lambda stage, part: progress(stage, graphs * part))
        done = {
            role: replace(graph, memory=made[role].memory, parity=made[role].parity, forms=made[role].forms)
            for role, graph in draft.graphs.items()
        }
        write_start(folder, done["codec_encode"].spec, done["codec_decode"].spec, draft.codec)
        portable = done["codec_decode"]
        forms = list(portable.forms)
        if codec_int8:
            forms.insert(
                0,
                int8_form(
                    folder,
                    portable.spec,
                    draft.codec.codebook_sizes,
                    lambda part: progress("codec in 8 bits", graphs + (1 - graphs) * part),
                ),
            )
        if "coreml" in targets:
            progress("static graphs", graphs)
            forms.append(static_form(folder, portable.spec, static_case, static_tolerance, draft.codec.fingerprint))
            for role in ("slow_ar", "fast_ar"):
                done[role] = replace(done[role], coreml_step=step_usability(folder, done[role].spec))
        done["codec_decode"] = replace(portable, forms=tuple(forms))
        voices = encode_references(references, Bundle(folder, replace(draft, graphs=done)))
        progress("hashing the files", 1.0)
        manifest = replace(draft, graphs=done, quantisation=_report(plans, made), licence=licence, voices=voices).sealed(
            describe_files(folder)
        )
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        bundle = Bundle.load(folder)
    bundle = replace(bundle, path=out)
    _warn_of_tensorrt(bundle)
    return bundle


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


def check_out(out: Path) -> None:
    """Check that `out` is new or an empty folder. Raises ExportError."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        what = "is not empty" if out.is_dir() else "is a file"
        raise ExportError(f"{out} exists and {what}", hint="name a folder that does not exist yet")
    check_place(out)


@contextmanager
def _written_aside(out: Path) -> Iterator[Path]:
    """Yield a new folder, which becomes `out`, a new or an empty one, if the block succeeds. Raises ExportError for OSErrors."""
    out = out.resolve()  # a link stays, and its target is written
    try:
        with _terminable(), new_folder(out) as aside:
            yield aside
            if out.exists():
                out.rmdir()
    except OSError as error:
        raise ExportError(f"{out} cannot be written: {error}", hint="check the free space and your permissions") from error


@contextmanager
def _terminable() -> Iterator[None]:
    """Make SIGTERM end the block with SystemExit, so that it cleans up. A program's own handler of the signal is kept."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


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


def _recipe_words(recipe: Recipe, *, head: str, lora: Lora | None, targets: Collection[str], codec_int8: bool) -> str:
    """Return the options of the export in words, the precision first."""
    parts = [recipe.precision, *(f"{name}={precision}" for name, precision in recipe.keep.items())]
    parts += ["codec in 8 bits"] if codec_int8 else []
    parts += [f"graphs for {', '.join(asked)}"] if (asked := [target for target in targets if target != "cpu"]) else []
    parts += ["full head"] if head == "full" else []
    parts += [f"LoRA {lora.path.name}, alpha {lora.alpha:g}"] if lora else []
    return ", ".join(parts)


def _report(plans: Mapping[str, Mapping[str, Storage]], made: Mapping[str, Made]) -> Quantisation | None:
    """Return the precision and error of each layer of the language model; None if no layer is quantised."""
    layers = tuple(
        LayerReport(
            f"{role}.{name.removesuffix('.weight')}",
            storage.precision,
            storage.block,
            made[role].errors.get(name, 0.0),
            storage.reason,
        )
        for role in ("slow_ar", "fast_ar")
        for name, storage in plans[role].items()
    )
    return Quantisation(layers) if any(layer.block for layer in layers) else None
