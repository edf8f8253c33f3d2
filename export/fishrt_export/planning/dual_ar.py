"""The plan for a language model and its codec."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from torch import nn

from fishrt.bundle.features import LanguageModel
from fishrt.bundle.folder import Bundle
from fishrt.bundle.quantisation import LEVELS
from fishrt.text.tokenizer import Tokenizer

from ..checkpoint.forms.folder import Checkpoint
from ..checkpoint.forms.recognise import WIDENED, Form
from ..checkpoint.quantised.integers import Integers, without_orders
from ..checkpoint.references import check_references
from ..checkpoint.weights import raise_if_any
from ..errors import ExportError
from ..graph.job import GraphJob
from ..graph.kept.blocks import kept
from ..graph.quantise import BITS
from ..options import Options
from ..sources.codec import CodecSource, open_codec
from ..sources.language_model import LanguageModelSource, open_language_model
from ..targets.codec.int8 import check_codec
from ..targets.coreml import check_codec as check_fixed
from .plan import Plan, draft, with_storage

log = logging.getLogger(__name__)


def plan_dual_ar(checkpoint: Path, out: Path, options: Options) -> Plan:
    """Read and check all of the checkpoint. Raises ExportError."""
    found = Checkpoint.of(checkpoint, weights=options.weights, tokenizer=options.tokenizer, codec=options.codec)
    found.check()
    codec = open_codec(found)
    language_model = open_language_model(found, family=options.family, codec=codec.kind, lora=options.lora)
    raise_if_any([*language_model.problems(), *codec.problems()])
    if not halves_fit(language_model, codec):
        raise ExportError(
            f"the language model has {language_model.config.num_codebooks} codebooks "
            f"and the codec has {len(codec.config.codebook_sizes)}",
            hint="take both from one checkpoint",
        )
    language_model = _stored(language_model, found.form, options)
    jobs = with_storage(options, codec, language_model.jobs(options.head))
    _check_targets(jobs, options)
    by_role = {job.role: job for job in jobs}
    if "coreml" in options.targets:
        check_fixed(by_role["codec_decode"].spec)
    if options.codec_int8:
        check_codec(codec.kind)
    lm = _describe(language_model, codec, options)
    manifest = draft(checkpoint, language_model.family, lm, codec, jobs, options)
    if found.form.quantised and options.precision is None:
        manifest = replace(manifest, recipe=options.words.replace("fp32", f"as {found.form.title}", 1))
    warn_of_unknown_codes(lm, codec.config.codebook_sizes[0])
    framed = not {"cuda", "tensorrt"}.isdisjoint(options.targets)
    frame = language_model.frame_job(lm, by_role["fast_ar"].plan) if framed else None
    plan = Plan(manifest, jobs, language_model.family, language_model.tokenizer.encode(), frame)
    plan.check_memory(checkpoint)
    plan.references = check_references(checkpoint, Bundle(out, manifest), Tokenizer.from_json(language_model.tokenizer.encode()))
    return plan


def _stored(language_model: LanguageModelSource, form: Form, options: Options) -> LanguageModelSource:
    """Return the model as it is stored: for integers that are kept, w2 in their order. Logs what happens to quantised weights."""
    if not form.quantised:
        return language_model
    if options.precision is None:
        if form.name in WIDENED:
            log.warning(
                "the weights are no integers (%s): they are stored in float32; --precision int8 takes a quarter", form.title
            )
        if form.name == "bnb4":
            log.warning("a CPU multiplies slowly by codes of a table (%s): --precision int8 speaks faster", form.title)
        if options.lora is not None:
            log.warning("the layers that the LoRA changes have no integers any more: they are stored in float32")
        return replace(language_model, weights=without_orders(language_model.weights))
    if options.precision in BITS:
        log.warning(
            "the weights are rounded already (%s, %d bits), and --precision %s rounds them a second time: the errors in the "
            "report are those of the second rounding alone; without --precision the integers stay where that is exact",
            form.title,
            form.bits,
            options.precision,
        )
    return language_model


def _check_targets(jobs: list[GraphJob], options: Options) -> None:
    """Raise ExportError for kept integers that a target cannot take."""
    if "tensorrt" not in options.targets:
        return
    for job in jobs:
        module = job.build()
        for name, storage in job.plan.items():
            if not storage.kept:
                continue
            hint = "export for TensorRT with --precision int8"
            if storage.precision in LEVELS:
                lacks = "codes of a table, as the weights"
            elif isinstance(module.get_submodule(name.removesuffix(".weight")), nn.Embedding):
                lacks, hint = (
                    "lookups in integers, as those",
                    f"{hint}, or keep the integers of layers with --keep '*embeddings=fp32'",
                )
            elif kept(job.weights, name, Integers).zeros is not None:
                lacks = "zero points, as the integers"
            else:
                continue
            raise ExportError(f"TensorRT takes no {lacks} of {job.role}.{name} have", hint=hint)


def _describe(language_model: LanguageModelSource, codec: CodecSource, options: Options) -> LanguageModel:
    """Return the manifest's entry. Codes that are in no codebook are not drawn."""
    lm, largest = language_model.describe(options.head), max(codec.config.codebook_sizes)
    return replace(lm, fast_candidates=min(lm.fast_candidates, largest + lm.code_offset))


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
