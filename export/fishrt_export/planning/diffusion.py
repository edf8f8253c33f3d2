"""The plan for a diffusion model and its codec of latents."""

from __future__ import annotations

from pathlib import Path

from fishrt.bundle.folder import Bundle

from ..checkpoint.families import ECHO
from ..checkpoint.references import check_references
from ..checkpoint.weights import raise_if_any
from ..errors import ExportError
from ..options import Options
from ..sources.echo import open_echo
from .plan import Plan, draft, with_storage


def plan_diffusion(checkpoint: Path, out: Path, options: Options) -> Plan:
    """Read and check all of the checkpoint. Raises ExportError."""
    others: dict[str, object] = {"--head full": options.head == "full", "--family": options.family, "--lora": options.lora}
    others |= {"--weights": options.weights, "--tokenizer": options.tokenizer}
    if refused := [name for name, given in {**others, "--codec-int8": options.codec_int8}.items() if given]:
        raise ExportError(f"{refused[0]} is for language models; {checkpoint} is a diffusion model")
    model, codec = open_echo(checkpoint, options.codec)
    raise_if_any(
        [*model.problems(), *codec.problems()],
        "the weights are not those of one model",
        "model and codec must be complete and undamaged",
    )
    jobs = with_storage(options, codec, model.jobs())
    plan = Plan(draft(checkpoint, ECHO, model.describe(), codec, jobs, options), jobs, ECHO)
    plan.check_memory(checkpoint)
    plan.references = check_references(checkpoint, Bundle(out, plan.manifest), None)
    return plan
