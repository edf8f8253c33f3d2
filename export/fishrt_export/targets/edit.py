"""Editing of graph files on onnx_ir. A graph is a small file; its weights are in other files of its folder, and stay there.

load ─► change nodes in place ─► tidy ─► save beside the portable graph, with references to the same weights
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes import common as passes

from ..errors import ExportError

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""
INLINE_BYTES = 1024
"""Smaller tensors are stored in the graph's own file."""
_PAGE, _LINE = 4096, 64
"""Alignment of large and of small tensors in bytes, so that files can be mapped."""
_AGAIN = "copy or export the bundle again"


class Weight(ir.ExternalTensor):
    """The numbers of an initializer in a file of the graph's folder, mapped when they are read. `load` has checked the place."""

    def _check_path_containment(self) -> None:
        """Accept links, as in the cache of a model hub; onnx_ir refuses them."""


def load(path: Path) -> ir.Model:
    """Return the graph of a file. No weights are read.

    Raises ExportError for a file that is no graph, and for weights that are outside of its folder, missing or incomplete.
    """
    try:
        model = ir.load(path)
    except (DecodeError, OSError) as error:
        raise ExportError(f"{path} cannot be read as a graph: {error}", hint=_AGAIN) from None
    sizes: dict[Path, int] = {}
    for value in model.graph.initializers.values():
        if not isinstance(tensor := value.const_value, ir.ExternalTensor):
            continue
        location = PurePosixPath(tensor.location)
        if location.is_absolute() or ".." in location.parts:
            raise ExportError(f"{path.name} names weights outside of its folder: {str(location)!r}", hint=_AGAIN)
        file = path.parent / location
        if file not in sizes:
            try:
                sizes[file] = file.stat().st_size
            except OSError as error:
                raise ExportError(f"the weights {file} cannot be read: {error.strerror}", hint=_AGAIN) from None
        if (tensor.offset or 0) + tensor.nbytes > sizes[file]:
            raise ExportError(f"the weights {file} end before {value.name}", hint=_AGAIN)
        place = tensor.location, tensor.offset, tensor.length, tensor.dtype
        value.const_value = Weight(*place, shape=tensor.shape, name=tensor.name, base_dir=path.parent)
    return model


def save(model: ir.Model, path: Path) -> None:
    """Write a graph into the folder of the one that it was made of; the weights of both are the same.

    New tensors of INLINE_BYTES and more are written to `path` + ".data", one by one.
    """
    values = [(value, value.const_value) for value in model.graph.initializers.values()]
    new = [(v, t) for v, t in values if t is not None and not isinstance(t, ir.ExternalTensor) and t.nbytes >= INLINE_BYTES]
    if new:
        data = path.with_name(f"{path.name}.data")
        with data.open("wb") as file:
            for value, tensor in new:
                align = _PAGE if tensor.nbytes >= 16 * _PAGE else _LINE
                offset = -(-file.tell() // align) * align
                file.seek(offset)
                file.write(tensor.tobytes())
                place, shape = (data.name, offset, tensor.nbytes), ir.Shape(tensor.shape.numpy())
                value.const_value = ir.ExternalTensor(
                    *place, tensor.dtype, shape=shape, name=str(value.name), base_dir=path.parent
                )
    ir.save(model, path)


def tidy(model: ir.Model) -> None:
    """Sort the nodes; remove those that no result needs, their weights, unused operator sets, and the types of inner values."""
    passes.TopologicalSortPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.type = value.shape = None


def infer(model: ir.Model) -> None:
    """Give every value its type, and its shape as far as it is known. Weights are not read.

    Raises ExportError if a type stays unknown.
    """
    passes.ShapeInferencePass()(model)
    for node in model.graph:
        for value in node.outputs:
            if value.name and value.dtype is None:
                raise ExportError(f"the type of {value.name} ({node.op_type}) cannot be inferred", hint="please report it")


def numbers(value: ir.Value | None) -> npt.NDArray[Any]:
    """Return the numbers of an initializer, mapped from the file of weights if they are there."""
    tensor = None if value is None else value.const_value
    assert tensor is not None
    return np.asarray(tensor.numpy())


def constant(graph: ir.Graph, name: str, array: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> ir.Value:
    """Return the initializer of this name; a new one with these numbers if there is none."""
    if name not in graph.initializers:
        initializer(graph, ir.tensor(np.asarray(array, dtype), name=name))
    return graph.initializers[name]


def initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Add a tensor under its name as an initializer. Return its value."""
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Return the node that produces a value, if it is this operator; else None."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    """Return the only node that reads a value, if it is this operator; else None."""
    readers = [node for node, _ in value.uses()]
    return readers[0] if len(readers) == 1 and readers[0].op_type == op_type and not value.is_graph_output() else None


def is_constant(value: ir.Value | None) -> bool:
    """Return whether a value is an initializer, or one cast or dequantised."""
    node = producer(value, "Cast") or producer(value, "DequantizeLinear")
    source = node.inputs[0] if node is not None else value
    return source is not None and source.is_initializer()
