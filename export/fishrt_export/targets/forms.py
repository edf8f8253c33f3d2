"""Forms of a portable graph for CPUs, CUDA devices and TensorRT. They are made when a bundle is made; none needs torch.

    portable graph ─┬─► fused operators ─► cpu: one session for each graph; products of integers by blocks or by rows
                    ├─► layers on rows ─► cpu: the codec's decoder
                    ├─► 16 bits ─► fused operators ─► weights as stored or packed ─► cuda: captured
                    └─► the fast AR's frame graph instead of it ─► cuda, tensorrt: a launch costs more there than a draw

A CUDA device computes a model in bfloat16 if it can, else in float16. With quantised weights it computes in float16, for which
ONNX Runtime has kernels that multiply by them directly. FLOAT32 names the graphs that stay in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from fishrt.bundle.manifest import Form
from fishrt.bundle.quantisation import LEVELS, ROWS
from fishrt_engines.engine import GraphSpec, TensorSpec

from ..graph.report import exact_file
from .attention import fast_operators
from .codec.decoder import by_rows, is_wide
from .edit import load, save
from .levels import multiply_levels
from .precision import compute_in, keep_layout, share_weights
from .rows import multiply_rows

log = logging.getLogger(__name__)

FLOAT32 = ("codec", "schedule")
"""Starts of the roles whose graphs are computed in float32 everywhere: a codec's, and that of the times, which reach 1000 rad."""


def make_forms(
    folder: Path,
    role: str,
    portable: GraphSpec,
    targets: Collection[str],
    frame: Form | None = None,
    *,
    hop: int | None = None,
) -> list[Form]:
    """Write the forms of one role's portable graph into its folder, and return them.

    frame: of the fast AR, its form for TensorRT, of which those for CUDA are made.
    hop: the codec's samples of a frame, for the role codec_decode.
    """
    forms = _cpu(folder, portable, hop if role == "codec_decode" else None) if "cpu" in targets else []
    if "cuda" in targets and not role.startswith(FLOAT32):
        if role == "fast_ar" and frame is None:
            log.warning("CUDA runs the fast AR once for each code, which is slower: the export was not made with --target cuda")
        forms += _cuda(folder, frame.spec if frame else portable)
    return forms


def _cpu(folder: Path, portable: GraphSpec, hop: int | None) -> list[Form]:
    """Return the form for CPUs; none if the portable graph is as fast: fused norms alone are not worth a file.

    A form that rounds activations by rows has the graph without this rounding beside it: see report.exact.
    """
    model = load(folder / portable.file)
    convolutions = by_rows(model, hop).ways if hop and is_wide(model) else {}
    rounds = any(node.op_type == "DequantizeLinear" for node in model.graph)
    in_rows = any(ROWS in node.metadata_props for node in model.graph)
    in_levels = multiply_levels(model)
    spec = replace(portable, columns=fast_operators(model), rounds_activations=rounds)
    if spec.columns is not None or convolutions or in_rows or in_levels:
        spec = replace(spec, file=_named(portable, "cpu"))
        if in_rows:
            save(model, folder / exact_file(spec))
            multiply_rows(model)
        save(model, folder / spec.file)
    return [] if spec == portable else [Form("cpu", spec, convolutions=convolutions)]


def _cuda(folder: Path, portable: GraphSpec) -> list[Form]:
    """Return forms of a model's graph, the fastest first."""
    nodes = list(load(folder / portable.file).graph)
    quantised = any(node.op_type == "DequantizeLinear" or not node.metadata_props.keys().isdisjoint(LEVELS) for node in nodes)
    forms = []
    for dtype in ("float16",) if quantised else ("bfloat16", "float16"):
        if (spec := device_form(folder, portable, dtype)) is None:
            log.warning("there is no form of %s for CUDA: its attention has no fast operator", portable.file)
            return []
        forms.append(Form("cuda", spec, needs=("bfloat16",) if dtype == "bfloat16" else ()))
    return forms


def device_form(folder: Path, portable: GraphSpec, dtype: str) -> GraphSpec | None:
    """Write the form that a CUDA device computes in `dtype`, and return its spec; None for attention without a fast operator."""
    model = load(folder / portable.file)
    if dtype != "float32":
        compute_in(model, dtype)
    columns = fast_operators(model, cuda=True)
    if columns is None and portable.states:
        return None
    multiply_levels(model)
    share_weights(model)
    keep_layout(model)
    spec = replace(_in(portable, dtype), file=_named(portable, dtype), columns=columns)
    save(model, folder / spec.file)
    return spec


def _in(spec: GraphSpec, dtype: str) -> GraphSpec:
    """Return the spec with its state in another type."""
    carried = {name for pair in spec.states for name in (pair.input, pair.output)}

    def typed(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(replace(tensor, dtype=dtype) if tensor.name in carried else tensor for tensor in tensors)

    return replace(spec, inputs=typed(spec.inputs), outputs=typed(spec.outputs))


def _named(spec: GraphSpec, suffix: str) -> str:
    return f"{Path(spec.file).stem}_{suffix}.onnx"
