"""Writing of a traced graph and its weights as two files. Weights are read, converted and written one by one.

A weight of 16 bits in the checkpoint keeps its type and is cast to float32 in the graph, which is bit-equal and halves the file.
An integer weight is stored as [inputs, outputs] before a DequantizeLinear, unsigned if it has zero points; all others keep the
checkpoint's layout. Codes of a table are stored as in kept/levels.py.

A second graph with the same weights refers to the first one's file of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir
import torch
from torch import Tensor

from fishrt.bundle.quantisation import LEVELS, ROWS

from ..checkpoint.quantised.integers import Integers
from ..checkpoint.quantised.levels import Levels
from .kept import levels
from .kept.blocks import Blocks, blocks_of, kept
from .kept.products import read_integers
from .kept.tables import only_looked_up, read_rows, table_parts
from .quantise import BITS, pack, quantise, quantise_columns
from .recipe import Storage

INLINE_BYTES = 1024
"""Smaller tensors are stored in the graph's own file."""
SCALES = ".scales"
"""Suffix of a quantised weight's name for the initialiser of its scales."""

ZEROS, BIASES, ORDER = ".zeros", ".biases", ".order"
"""Suffixes for the zero points and biases of a checkpoint's integers and for the order of their inputs; see kept/blocks.py."""
SHIFTS = {4: -8, 8: -128}
"""By bits, what turns signed numbers into unsigned ones less half their range and back, by exclusive or."""
_HALF_BYTES = (ir.DataType.INT4, ir.DataType.UINT4)

_PAGE, _LINE = 4096, 64
"""Alignment of large and of small tensors in bytes, so that files can be mapped."""
_KINDS = {
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float16: ir.DataType.FLOAT16,
    torch.float32: ir.DataType.FLOAT,
}
_NARROW = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)
_TABLES = ("cos", "sin")
"""Names of rotary tables, whose values are exact in bfloat16."""


def store(
    model: ir.Model,
    path: Path,
    weights: Mapping[str, Tensor],
    plan: Mapping[str, Storage],
    progress: Callable[[float], None] = lambda _: None,
) -> int:
    """Write the graph to `path` and its weights to `path` + ".data". Return the bytes of the weights in memory.

    The bytes are those of ONNX Runtime on a CPU: it keeps integers, maps lookup tables, and widens other weights to float32.
    plan: storage by name; weights without an entry keep the checkpoint's type. progress receives the completed part, 0..1.
    """
    graph, memory = model.graph, 0
    names = list(graph.initializers)
    with (path.parent / f"{path.name}.data").open("wb") as file:
        data = _Data(file, path.parent)
        for done, name in enumerate(names):
            progress(done / len(names))
            value = graph.initializers[name]
            storage = plan.get(name, Storage("fp32"))
            if storage.kept and only_looked_up(value):
                memory += _store_rows(graph, value, weights, data)
            elif storage.precision in LEVELS:
                memory += _store_levels(graph, value, weights, storage.precision, data)
            elif storage.block is not None:
                memory += _store_integers(graph, value, weights, storage, data)
            else:
                tensor = weights[name] if name in weights else _constant(value)
                memory += _store_as_is(graph, value, stored_float(tensor, storage.precision), data)
    ir.save(model, path)
    return memory


def link(model: ir.Model, path: Path, stored: Path) -> None:
    """Write a graph to `path`, with the weights that `store` has written for the graph file `stored` in the same folder.

    A weight's name in `stored` is without the first part. Tensors that are not there, which are few, are stored in `path` itself.
    """
    graph, there = model.graph, ir.load(stored).graph.initializers

    def tensor(name: str) -> ir.TensorProtocol:
        found = there[name.partition(".")[2]].const_value
        assert found is not None
        found.name = name
        return found

    for name in [name for name in graph.initializers if name.partition(".")[2] in there]:
        value = graph.initializers[name]
        if kind := next((kind for kind, end in levels.LARGEST.items() if name.partition(".")[2] + end in there), None):
            levels.read_levels(graph, value, tensor(name), tensor(name + levels.LARGEST[kind]), kind)
        elif name.partition(".")[2] + SCALES in there:
            if only_looked_up(value):
                of_rows = {"integers": "", "scales": SCALES, "biases": BIASES}
                have = {what: name + end for what, end in of_rows.items() if name.partition(".")[2] + end in there}
                read_rows(graph, value, {what: tensor(full) for what, full in have.items()})
                continue
            ends = [end for end in ("", SCALES, ZEROS, BIASES, ORDER) if name.partition(".")[2] + end in there]
            found = {end: tensor(name + end) for end in ends}
            biases, order = found.pop(BIASES, None), found.pop(ORDER, None)
            read_integers(graph, value, list(found.values()), biases, order)
        else:
            _read_floats(graph, value, tensor(name))
    ir.save(model, path)


def stored_float(tensor: Tensor, precision: str) -> Tensor:
    """Return the tensor as it is stored: in float16 if its precision is fp16 and no number becomes infinite, else as it is."""
    if precision != "fp16" or tensor.dtype == torch.float16:
        return tensor
    largest = torch.finfo(torch.float16).max
    fits = bool((tensor.amax() <= largest) & (tensor.amin() >= -largest))
    return tensor.to(torch.float16) if fits else tensor


class _Data:
    """The file of weights during writing."""

    def __init__(self, file: BinaryIO, folder: Path) -> None:
        self._file, self._folder = file, folder

    def tensor(self, name: str, tensor: Tensor, kind: ir.DataType, shape: tuple[int, ...]) -> ir.TensorProtocol:
        """Write a tensor. Return its entry in the graph: the tensor itself if it is small, else its place in the file."""
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy()
        if raw.nbytes < INLINE_BYTES:
            return ir.PackedTensor(raw, kind, shape=shape, name=name) if kind in _HALF_BYTES else _inline(name, tensor, kind)
        align = _PAGE if raw.nbytes >= 16 * _PAGE else _LINE
        offset = -(-self._file.tell() // align) * align
        self._file.seek(offset)
        self._file.write(raw.data)
        location = Path(self._file.name).name
        return ir.ExternalTensor(location, offset, raw.nbytes, kind, shape=ir.Shape(shape), name=name, base_dir=self._folder)


def _inline(name: str, tensor: Tensor, kind: ir.DataType) -> ir.TensorProtocol:
    tensor = tensor.clone()  # a part of a mapped checkpoint would keep all its pages for as long as the graph lives
    array = tensor.view(torch.uint16).numpy().view(kind.numpy()) if kind == ir.DataType.BFLOAT16 else tensor.numpy()
    return ir.Tensor(array, dtype=kind, name=name)


def _constant(value: ir.Value) -> Tensor:
    """Return a tensor that is in no checkpoint, a rotary table or a constant of the graph; tables as bfloat16."""
    assert value.const_value is not None
    tensor = torch.from_numpy(value.const_value.numpy().copy())
    return tensor.to(torch.bfloat16) if (value.name or "").rpartition(".")[2] in _TABLES else tensor


def _store_as_is(graph: ir.Graph, value: ir.Value, tensor: Tensor, data: _Data) -> int:
    """Store a tensor in its own type. Return its bytes in memory."""
    name, kind = value.name, _KINDS.get(tensor.dtype, value.dtype)
    assert name is not None
    assert kind is not None
    widened = _read_floats(graph, value, data.tensor(name, tensor, kind, tuple(tensor.shape)))
    return tensor.numel() * (4 if widened else tensor.element_size())


def _read_floats(graph: ir.Graph, value: ir.Value, stored: ir.TensorProtocol) -> bool:
    """Make the readers of an initialiser read a stored tensor, with a cast behind 16 bits. Return whether it is widened whole."""
    if stored.dtype not in _NARROW:
        value.const_value = stored
        return False
    name = value.name or ""
    narrow = ir.Value(name=name, type=ir.TensorType(stored.dtype), shape=value.shape, const_value=stored)
    cast: ir.Node | None = None
    for node, index in list(value.uses()):
        if node.op_type == "Gather" and index == 0:
            _cast_result(node, narrow)
            continue
        if cast is None:
            cast = ir.node("Cast", [narrow], {"to": ir.DataType.FLOAT}, name=f"{name}.cast")
            cast.outputs[0].name = f"{name}.float32"
            graph.insert_before(graph[0], cast)
        node.replace_input_with(index, cast.outputs[0])
    graph.initializers.pop(name)
    graph.register_initializer(narrow)
    return cast is not None


def _cast_result(gather: ir.Node, table: ir.Value) -> None:
    gather.replace_input_with(0, table)
    rows = gather.outputs[0]
    cast = ir.node("Cast", [rows], {"to": ir.DataType.FLOAT}, name=f"{rows.name}.cast")
    cast.outputs[0].name = f"{rows.name}.float32"
    for node, index in list(rows.uses()):
        if node is not cast:
            node.replace_input_with(index, cast.outputs[0])
    assert gather.graph is not None
    gather.graph.insert_after(gather, cast)


def _store_integers(graph: ir.Graph, value: ir.Value, weights: Mapping[str, Tensor], storage: Storage, data: _Data) -> int:
    """Store a weight as integers, those of the checkpoint or rounded here. Return its bytes in memory."""
    name, bits, block = value.name, BITS[storage.precision], storage.block
    assert name is not None
    assert block is not None
    if storage.kept:
        found = blocks_of(kept(weights, name, Integers))
        assert found is not None
        blocks = found
    elif storage.precision == ROWS:
        blocks = Blocks(*quantise_columns(weights[name], block))
    else:
        blocks = Blocks(*quantise(weights[name], bits, block))
    signed = blocks.zeros is None
    kind = {4: ir.DataType.INT4, 8: ir.DataType.INT8} if signed else {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}

    def stored(end: str, integers: Tensor) -> ir.TensorProtocol:
        shifted = integers if signed else integers ^ SHIFTS[bits]
        return data.tensor(name + end, pack(shifted) if bits == 4 else _bytes(shifted, signed), kind[bits], tuple(integers.shape))

    scales = data.tensor(name + SCALES, blocks.scales, ir.DataType.FLOAT, tuple(blocks.scales.shape))
    parts = [stored("", blocks.integers), scales]
    if blocks.zeros is not None:
        parts.append(stored(ZEROS, blocks.zeros))
    others = {BIASES: (blocks.biases, ir.DataType.FLOAT), ORDER: (blocks.order, ir.DataType.INT64)}
    more = {end: data.tensor(name + end, t, kind, tuple(t.shape)) for end, (t, kind) in others.items() if t is not None}
    read_integers(graph, value, parts, more.get(BIASES), more.get(ORDER), mark={ROWS: ""} if storage.precision == ROWS else None)
    added = 0 if blocks.biases is None else blocks.biases.nbytes
    return blocks.integers.numel() * bits // 8 + blocks.scales.nbytes + added


def _store_rows(graph: ir.Graph, value: ir.Value, weights: Mapping[str, Tensor], data: _Data) -> int:
    """Store an embedding table of the checkpoint's integers. Return its bytes in memory."""
    name = value.name or ""
    parts = table_parts(kept(weights, name, Integers))
    assert parts is not None
    ends = {"integers": "", "scales": SCALES, "biases": BIASES}
    found = {what: tensor.contiguous() for what, tensor in zip(ends, parts, strict=True) if tensor is not None}
    stored = {}
    for what, tensor in found.items():
        kind = ir.DataType.INT8 if what == "integers" else ir.DataType.FLOAT
        stored[what] = data.tensor(name + ends[what], tensor, kind, tuple(tensor.shape))
    read_rows(graph, value, stored)
    return sum(tensor.nbytes for tensor in found.values())


def _store_levels(graph: ir.Graph, value: ir.Value, weights: Mapping[str, Tensor], kind: str, data: _Data) -> int:
    """Store a weight as the checkpoint's codes of a table. Return its bytes in memory."""
    name = value.name or ""
    found = kept(weights, name, Levels)
    blocks = tuple(found.largest.shape)
    codes = data.tensor(name, found.codes.view(*blocks, -1), ir.DataType.UINT8, (*blocks, found.block // 2))
    largest = data.tensor(name + levels.LARGEST[kind], found.largest.view(*blocks, 1, 1), ir.DataType.FLOAT, (*blocks, 1, 1))
    levels.read_levels(graph, value, codes, largest, kind)
    return found.codes.nbytes + found.largest.nbytes


def _bytes(integers: Tensor, signed: bool) -> Tensor:
    return integers if signed else integers.contiguous().view(torch.uint8)
