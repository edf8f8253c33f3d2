"""Tracing of a torch module as one portable ONNX graph: standard operators of opset 24.

The module computes in float32. Initialisers keep the names of its parameters. Their values are arbitrary; store.py writes them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import Parameter, signature

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript.optimizer import optimize_ir
from torch import Tensor, nn

from fishrt.version import __version__
from fishrt_engines.engine import GraphSpec, TensorSpec

from ..errors import ExportError
from ..models.transformer import ONNX_OPSET

IR_VERSION = 10

# Sizes of the example inputs. All differ and none is 0 or 1, so that no dimension is mistaken for a constant or another one.
_EXAMPLE_DIMS = {
    **{"batch": 2, "length": 3, "cache": 7, "frames": 5},
    **{"rows": 4, "tokens": 6, "patches": 9, "prefix": 11, "steps": 13},
}

Dims = Mapping[str, int | tuple[int, str]]
"""Dimensions of one graph: a smallest size, {"samples": 769}, or a multiple of another, {"samples": (hop, "frames")}."""


def trace(module: nn.Module, spec: GraphSpec, own_dims: Dims) -> ir.Model:
    """Return the graph, with the parameters in float32 in the layout of the module.

    Raises ExportError if the traced graph does not match `spec`.
    """
    model = _trace(module, spec, own_dims)
    _optimize(model)
    _describe(model, spec)
    _clean(model, spec)
    return model


def _trace(module: nn.Module, spec: GraphSpec, own_dims: Dims) -> ir.Model:
    sizes, dims = dict(_EXAMPLE_DIMS), {name: torch.export.Dim(name) for name in _EXAMPLE_DIMS}
    for name, rule in own_dims.items():
        if isinstance(rule, int):
            sizes[name], dims[name] = 16 * rule + 1, torch.export.Dim(name, min=rule)
        else:
            factor, base = rule
            sizes[name], dims[name] = factor * sizes[base], factor * dims[base]

    def example(tensor: TensorSpec) -> Tensor:
        return torch.zeros(tensor.resolve(sizes), dtype=getattr(torch, tensor.dtype))

    def dynamic(tensor: TensorSpec) -> dict[int, object]:
        return {axis: dims[dim] for axis, dim in enumerate(tensor.shape) if isinstance(dim, str)}

    # The state is one list argument, of which the exporter makes one graph input for each tensor.
    arguments: list[object] = [example(tensor) for tensor in spec.feeds]
    dynamic_shapes: list[object] = [dynamic(tensor) for tensor in spec.feeds]
    if spec.states:
        arguments.append([example(tensor) for tensor in spec.state_tensors])
        dynamic_shapes.append([dynamic(tensor) for tensor in spec.state_tensors])
    if any(parameter.kind is Parameter.VAR_POSITIONAL for parameter in signature(module.forward).parameters.values()):
        dynamic_shapes = [tuple(dynamic_shapes)]
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module.eval(),
            tuple(arguments),
            dynamo=True,
            opset_version=ONNX_OPSET,
            optimize=False,
            dynamic_shapes=tuple(dynamic_shapes),
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            verbose=False,
        )
    if program is None:
        raise AssertionError("the dynamo exporter returned nothing")
    return program.model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings of torchvision and of its own deprecations, which a user cannot mend."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _optimize(model: ir.Model) -> None:
    """Fold constants, but no weights: the file keeps each in its own layout under its own name."""
    weights = set(model.graph.initializers)

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(value is not None and value.name in weights for value in node.inputs) else None

    optimize_ir(model, should_fold=should_fold, onnx_shape_inference=False)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=False)(model)
    passes.RemoveUnusedNodesPass()(model)


def _describe(model: ir.Model, spec: GraphSpec) -> None:
    """Give inputs and outputs the shapes of `spec`. Raises ExportError unless they have its names, ranks and dtypes."""
    for found, wanted in ((model.graph.inputs, spec.inputs), (model.graph.outputs, spec.outputs)):
        for value, tensor in zip(found, wanted, strict=True):
            dtype = None if value.dtype is None else value.dtype.numpy().name
            rank = None if value.shape is None else len(value.shape)
            if (value.name, dtype, rank) != (tensor.name, tensor.dtype, len(tensor.shape)):
                raise ExportError(f"{spec.file}: the exporter made {value.name} {dtype} of rank {rank}; expected {tensor}")
            value.shape = ir.Shape(tensor.shape)


def _clean(model: ir.Model, spec: GraphSpec) -> None:
    """Remove stack traces with this machine's paths, and inner shapes with the exporter's own dimension names.

    Raises ExportError for operators outside the standard domain and opset.
    """
    outer = {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
    for node in model.graph:
        for value in node.outputs:
            if value.name not in outer:
                value.shape = value.type = None
    passes.ClearMetadataAndDocStringPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "fishrt", __version__
    domains = {node.domain for node in model.graph} | set(model.opset_imports)
    if domains - {""} or model.opset_imports[""] != ONNX_OPSET:
        raise ExportError(f"{spec.file}: the exporter used operators beyond ONNX opset {ONNX_OPSET}: {sorted(domains)}")
