"""`fishrt build-trt`: a bundle's graphs as TensorRT plans for this machine."""

from __future__ import annotations

import time
from pathlib import Path

import click

from ...language_model.context import FIRST_FRAMES
from ..base.commands import print_json
from ..base.options import Number, Whole, json_option, load_bundle, needs_onnx, quiet_option
from ..base.progress import Reporter

PRECISIONS = ("bf16", "fp16", "fp8", "int8", "int4")


@click.command("build-trt", short_help="Build the TensorRT plans of a bundle.")
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Number format in which the language model computes. int8 and int4 are for bundles whose weights are stored so (see "
    "`fishrt export --precision`); they compute in fp16.  [default: fp16 for such bundles; else bf16, or fp16 where the device "
    "has no bf16]",
)
@click.option(
    "--max-len",
    "max_lens",
    multiple=True,
    type=Whole(min=2 * FIRST_FRAMES),
    metavar="N",
    help="Largest number of positions of prompt and speech together. May be repeated: a step reads all positions of its plan, so "
    "short speech and large batches are faster from a shorter one, which takes the memory of its weights again.  [default: the "
    "model's, at most 4096]",
)
@click.option(
    "--max-batch",
    type=Whole(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Largest number of sequences that are spoken at once.",
)
@click.option(
    "--workspace",
    type=Number(min=0, min_open=True),
    metavar="GIB",
    help="Device memory for the kernels of a graph, in GiB. Below 4, TensorRT may have to leave out the fastest ones.  "
    "[default: all of the device]",
)
@click.option(
    "--fp32-attention/--no-fp32-attention",
    default=None,
    help="Compute attention in float32: fp16 is inaccurate with long prompts.  [default: yes for fp16]",
)
@click.option(
    "--primitive-attention",
    is_flag=True,
    help="Build attention from simple operators at once. Otherwise, TensorRT's own is tried first, then the same taken apart.",
)
@quiet_option
@json_option
def build_trt(
    bundle: Path | None,
    precision: str | None,
    max_lens: tuple[int, ...],
    max_batch: int,
    workspace: float | None,
    fp32_attention: bool | None,
    primitive_attention: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Build the TensorRT plans of BUNDLE (default: the embedded voice), for this machine's GPU and this TensorRT.

    It takes minutes for each graph; nothing else should use the GPU meanwhile. Graphs that were built before with the same
    options are not built again. Then: fishrt speak --provider tensorrt.
    """
    from fishrt_engines.trt.api import load_tensorrt
    from fishrt_engines.trt.device import open_device

    loaded, reporter = load_bundle(bundle), Reporter(quiet=quiet or as_json)
    load_tensorrt()  # before onnx: the extra trt brings both
    with needs_onnx("build-trt"):
        from fishrt_export.targets.tensorrt.build import PlanOptions, build_plan, plan_requests

    most = None if workspace is None else int(workspace * (1 << 30))
    options = PlanOptions(precision, max_lens, max_batch, most, fp32_attention, primitive_attention)
    plans = []
    for role, request in plan_requests(loaded, options, open_device().compute_capability):
        begun = time.perf_counter()

        def show(stage: str, part: float, graph: str = request.spec.file) -> None:
            reporter.show(f"{graph}: {stage}", part)

        plan, built = build_plan(request, show)
        seconds, size = time.perf_counter() - begun, plan.path.stat().st_size
        how = f"built in {seconds:,.0f} s" if built else "built before"
        if plan.attention == "decomposable":
            how += ", with attention taken apart by TensorRT"
        elif plan.attention == "primitive":
            how += ", with attention of simple operators"
        length = f" for {request.lowering.max_len:,} positions" if len(max_lens) > 1 and request.lowering.max_len else ""
        reporter.done(f"{size / 1e6:>10,.1f} MB  {request.spec.file} in {request.lowering.precision}{length}, {how}")
        plans.append(
            {
                "role": role,
                "graph": request.spec.file,
                "precision": request.lowering.precision,
                "max_len": request.lowering.max_len,
                "attention": plan.attention,
                "path": str(plan.path),
                "bytes": size,
                "built": built,
                "seconds": round(seconds, 3),
            }
        )
    print_json({"bundle": str(loaded.path), "plans": plans})
