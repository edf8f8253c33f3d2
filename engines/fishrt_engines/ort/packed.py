"""The part of the ONNX file format that running a graph needs: where its weights are, and graphs of a node or two.

ONNX Runtime depends on protobuf but not on the `onnx` package, which would add a fifth to an installation. The messages in use
are therefore declared here, with the field numbers of `onnx.proto`. protobuf keeps unknown fields unchanged.

ONNX Runtime 1.31 saves a graph that it has packed for this machine with aligned tensors of more than a megabyte only, and reads
packed ones at other offsets wrongly: `align` moves them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ..errors import GraphError, ProviderError

_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "Model": {"ir_version": (1, "int64"), "graph": (7, "Graph"), "opset_import": (8, "*OperatorSet")},
    "OperatorSet": {"version": (2, "int64")},
    "Graph": {"node": (1, "*Node"), "initializer": (5, "*Tensor"), "input": (11, "*ValueInfo"), "output": (12, "*ValueInfo")},
    "Node": {"input": (1, "*string"), "output": (2, "*string"), "op_type": (4, "string"), "attribute": (5, "*Attribute")},
    "Attribute": {"name": (1, "string"), "i": (3, "int64"), "type": (20, "int32")},
    "Tensor": {"dims": (1, "*int64"), "data_type": (2, "int32"), "name": (8, "string"), "external_data": (13, "*Entry")},
    "Entry": {"key": (1, "string"), "value": (2, "string")},
    "ValueInfo": {"name": (1, "string"), "type": (2, "Type")},
    "Type": {"tensor_type": (1, "TensorType")},
    "TensorType": {"elem_type": (1, "int32"), "shape": (2, "Shape")},
    "Shape": {"dim": (1, "*Dimension")},
    "Dimension": {},
}
"""Number and type of each field, by message and field name; a star marks a repeated field."""
CODES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "float64": 11, "bfloat16": 16}
"""Number of an element type in a file, by its name in numpy or ml_dtypes."""
_INTEGER = 2
"""The type of an attribute that is an integer."""
_ALIGNMENT = 4096
"""Bytes. Packed weights are read with aligned loads, and locate their parts relative to an aligned start."""
_BLOCK = 1 << 24


def parse_model(path: Path) -> Any:
    """Return the Model message of a graph file. Raises GraphError for another file, ProviderError without protobuf."""
    model_type = _classes()["fishrt_onnx.Model"]
    from google.protobuf.message import DecodeError

    try:
        return model_type.FromString(path.read_bytes())
    except DecodeError as error:
        raise GraphError(f"{path.name} is not a graph: {error}", hint="the file is damaged; fetch or export it again") from None


def external_places(model: Any) -> list[Any]:
    """Return the entries of a Model message that name the files of its weights, in the folder of the graph.

    Raises GraphError for a name that leads out of the folder. A file of the folder may be a link.
    """
    places = [entry for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"]
    for name in {entry.value for entry in places}:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise GraphError(f"a graph names weights outside of its folder: {name!r}", hint="export the bundle again")
    return places


Node = tuple[str, Sequence[str], str, Mapping[str, int]]
"""Operator, names of inputs, name of the output, and attributes of a node."""


def small_graph(nodes: Sequence[Node], inputs: dict[str, tuple[str, int]], outputs: dict[str, tuple[str, int]]) -> bytes:
    """Return a graph of standard operators without weights. inputs, outputs: element type and rank by name."""
    model = _classes()["fishrt_onnx.Model"](ir_version=10)
    model.opset_import.add(version=24)
    for op_type, given, made, attributes in nodes:
        node = model.graph.node.add(op_type=op_type, input=given, output=[made])
        for name, value in attributes.items():
            node.attribute.add(name=name, i=value, type=_INTEGER)
    for values, described in ((model.graph.input, inputs), (model.graph.output, outputs)):
        for name, (element, rank) in described.items():
            tensor = values.add(name=name).type.tensor_type
            tensor.elem_type = CODES[element]
            for _ in range(rank):
                tensor.shape.dim.add()
    return bytes(model.SerializeToString())


def align(graph: Path, data: Path, target: Path) -> None:
    """Copy a saved graph, whose weights are in `data`, to `target`, with all weights at aligned offsets in `target`.data."""
    model = parse_model(graph)
    weights = target.with_name(f"{target.name}.data")
    with data.open("rb") as source, weights.open("wb") as aligned:
        for tensor in model.graph.initializer:
            entries = {entry.key: entry for entry in tensor.external_data}
            if not entries:
                continue
            entries["location"].value = weights.name
            place = _copy(source, int(entries["offset"].value), int(entries["length"].value), aligned)
            entries["offset"].value = str(place)
            for key, entry in entries.items():
                if key.startswith("prepacked"):
                    _move_packed(entry, source, aligned)
    target.write_bytes(model.SerializeToString())


def _move_packed(entry: Any, source: BinaryIO, target: BinaryIO) -> None:
    """Copy the buffers of one packed weight and update its entry: "kernel+hash|offset;length;checksum|…"."""
    name, *buffers = entry.value.split("|")
    moved = []
    for buffer in buffers:
        offset, length, checksum = buffer.split(";")
        moved.append(f"{_copy(source, int(offset), int(length), target)};{length};{checksum}")
    entry.value = "|".join([name, *moved])


def _copy(source: BinaryIO, offset: int, length: int, target: BinaryIO) -> int:
    """Append bytes at the next aligned offset, and return the offset."""
    start = -(-target.tell() // _ALIGNMENT) * _ALIGNMENT
    target.write(bytes(start - target.tell()))
    source.seek(offset)
    while length > 0:
        block = source.read(min(length, _BLOCK))
        if not block:
            raise OSError("the saved graph is shorter than its description")
        target.write(block)
        length -= len(block)
    return start


@cache
def _classes() -> dict[str, Any]:
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ImportError:
        raise ProviderError("reading a graph needs protobuf, which is not installed", hint='pip install "fishrt[cpu]"') from None

    field_types = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="fishrt_onnx.proto", package="fishrt_onnx", syntax="proto2")
    for message_name, members in _MESSAGES.items():
        declared = file.message_type.add(name=message_name)
        for field_name, (number, kind) in members.items():
            field = declared.field.add(name=field_name, number=number)
            field.label = field_types.LABEL_REPEATED if kind.startswith("*") else field_types.LABEL_OPTIONAL
            plain = kind.removeprefix("*")
            if plain in _MESSAGES:
                field.type, field.type_name = field_types.TYPE_MESSAGE, f".fishrt_onnx.{plain}"
            else:
                field.type = getattr(field_types, f"TYPE_{plain.upper()}")
    classes: dict[str, Any] = message_factory.GetMessages([file], pool=descriptor_pool.DescriptorPool())
    return classes
