"""The plan for a language model and its codec."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from fishrt.bundle.features import LanguageModel
from fishrt.bundle.folder import Bundle
from fishrt.text.tokenizer import Tokenizer

from ..checkpoint.references import check_references
from ..checkpoint.weights import raise_if_any
from ..errors import ExportError
from ..options import Options
from ..sources.codec import CodecSource, open_codec
from ..sources.language_model import LanguageModelSource, open_language_model
from ..targets.codec_int8 import check_codec
from ..targets.coreml import check_codec as check_fixed
from .plan import Plan, draft, with_storage

log = logging.getLogger(__name__)


def plan_dual_ar(checkpoint: Path, out: Path, options: Options) -> Plan:
    """Read and check all of the checkpoint. Raises ExportError."""
    if options.codec is not None:
        raise ExportError("--codec is for diffusion models; the codec of a language model is in its folder")
    codec = open_codec(checkpoint)
    language_model = open_language_model(checkpoint, family=options.family, codec=codec.kind, lora=options.lora)
    raise_if_any([*language_model.problems(), *codec.problems()])
    if not halves_fit(language_model, codec):
        raise ExportError(
            f"the language model has {language_model.config.num_codebooks} codebooks "
            f"and the codec has {len(codec.config.codebook_sizes)}",
            hint="take both from one checkpoint",
        )
    jobs = with_storage(options, codec, language_model.jobs(options.head))
    by_role = {job.role: job for job in jobs}
    if "coreml" in options.targets:
        check_fixed(by_role["codec_decode"].spec)
    if options.codec_int8:
        check_codec(codec.kind)
    lm = _describe(language_model, codec, options)
    manifest = draft(checkpoint, language_model.family, lm, codec, jobs, options)
    warn_of_unknown_codes(lm, codec.config.codebook_sizes[0])
    framed = not {"cuda", "tensorrt"}.isdisjoint(options.targets)
    frame = language_model.frame_job(lm, by_role["fast_ar"].plan) if framed else None
    plan = Plan(manifest, jobs, language_model.family, language_model.tokenizer.encode(), frame)
    plan.check_memory(checkpoint)
    plan.references = check_references(checkpoint, Bundle(out, manifest), Tokenizer.from_json(language_model.tokenizer.encode()))
    return plan


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
