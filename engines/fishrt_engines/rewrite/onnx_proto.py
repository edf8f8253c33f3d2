"""The part of the ONNX file format that is needed to rewrite and check graphs.

A graph's file without its weights is a small protobuf message. ONNX Runtime depends on protobuf but not on the `onnx` package,
which would add a fifth to an installation. The messages in use are therefore declared here, with the field numbers of
`onnx.proto`. protobuf keeps unknown fields unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ..errors import GraphError, ProviderError

_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "Model": {"ir_version": (1, "int64"), "graph": (7, "Graph"), "opset_import": (8, "*OperatorSet")},
    "OperatorSet": {"domain": (1, "string"), "version": (2, "int64")},
    "Graph": {
        "node": (1, "*Node"),
        "initializer": (5, "*Tensor"),
        "input": (11, "*ValueInfo"),
        "output": (12, "*ValueInfo"),
    },
    "Node": {
        "input": (1, "*string"),
        "output": (2, "*string"),
        "name": (3, "string"),
        "op_type": (4, "string"),
        "attribute": (5, "*Attribute"),
        "domain": (7, "string"),
    },
    "Attribute": {
        "name": (1, "string"),
        "f": (2, "float"),
        "i": (3, "int64"),
        "s": (4, "bytes"),
        "t": (5, "Tensor"),
        "g": (6, "Graph"),
        "ints": (8, "*int64"),
        "type": (20, "int32"),
    },
    "Tensor": {
        "dims": (1, "*int64"),
        "data_type": (2, "int32"),
        "float_data": (4, "*float"),
        "int32_data": (5, "*int32"),
        "int64_data": (7, "*int64"),
        "name": (8, "string"),
        "raw_data": (9, "bytes"),
        "external_data": (13, "*Entry"),
    },
    "Entry": {"key": (1, "string"), "value": (2, "string")},
    "ValueInfo": {"name": (1, "string"), "type": (2, "Type")},
    "Type": {"tensor_type": (1, "TensorType")},
    "TensorType": {"elem_type": (1, "int32"), "shape": (2, "Shape")},
    "Shape": {"dim": (1, "*Dimension")},
    "Dimension": {"dim_value": (1, "int64"), "dim_param": (2, "string")},
}
"""Number and type of each field, by message and field name; a star marks a repeated field."""

ATTRIBUTE_FLOAT, ATTRIBUTE_INT, ATTRIBUTE_STRING, ATTRIBUTE_INTS = 1, 2, 3, 7
TENSOR_INT32, TENSOR_INT64 = 6, 7
DTYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    8: "string",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
    16: "bfloat16",
    17: "float8e4m3fn",
    21: "uint4",
    22: "int4",
    23: "float4e2m1",
    24: "float8e8m0",
}
"""Name of an element type in numpy or ml_dtypes, by its number in a file."""
CODES = {name: code for code, name in DTYPES.items()}
"""Number of an element type by its name."""
_WIDTHS = {"int4": 4, "uint4": 4, "int8": 8, "uint8": 8, "bool": 8, "float16": 16, "bfloat16": 16, "int64": 64, "float64": 64}
"""Bits of one value, by element type; other types of weights have 32."""


def message(name: str) -> Any:
    """Return the class of one of the messages above. Raises ProviderError if protobuf is not installed."""
    return _classes()[f"fishrt_onnx.{name}"]


def parse_model(data: bytes, name: str) -> Any:
    """Return the Model message of a graph file. name: of the file, for errors. Raises GraphError for other bytes."""
    model_type = message("Model")
    from google.protobuf.message import DecodeError

    try:
        return model_type.FromString(data)
    except DecodeError as error:
        raise GraphError(f"{name} is not a graph: {error}", hint="the file is damaged; fetch or export it again") from None


def external_places(model: Any) -> list[Any]:
    """Return the entries of a Model message that name the files of its weights, in the folder of the graph.

    Raises GraphError for a name that leads out of the folder. A file of the folder may be a link.
    """
    places = [entry for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"]
    for name in {entry.value for entry in places}:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise GraphError(f"a graph names weights outside of its folder: {name!r}", hint="export the bundle again")
    return places


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


def node(op_type: str, inputs: list[str], outputs: list[str], *, domain: str = "", **attributes: float | int | list[int]) -> Any:
    """Return a Node. An attribute is an integer, a list of integers or a float; an empty name omits an optional input."""
    made = message("Node")(op_type=op_type, name=f"{op_type}.{outputs[0]}", domain=domain, input=inputs, output=outputs)
    for key, value in attributes.items():
        if isinstance(value, float):
            made.attribute.add(name=key, type=ATTRIBUTE_FLOAT, f=value)
        elif isinstance(value, list):
            made.attribute.add(name=key, type=ATTRIBUTE_INTS, ints=value)
        else:
            made.attribute.add(name=key, type=ATTRIBUTE_INT, i=value)
    return made


def int64_tensor(name: str, values: list[int], *, scalar: bool = False) -> Any:
    """Return an int64 Tensor of rank 1, or of rank 0 for a `scalar`."""
    return message("Tensor")(name=name, data_type=TENSOR_INT64, dims=[] if scalar else [len(values)], int64_data=values)


def array_tensor(name: str, array: np.ndarray[Any, Any]) -> Any:
    """Return a Tensor that stores an array in the graph's file. Its dtype is one of DTYPES."""
    return message("Tensor")(name=name, data_type=CODES[array.dtype.name], dims=array.shape, raw_data=array.tobytes())


def value_info(name: str, dtype: str, shape: Sequence[int | str]) -> Any:
    """Return an input or output of a graph. A string is the name of a symbolic dimension."""
    made = message("ValueInfo")(name=name)
    tensor = made.type.tensor_type
    tensor.elem_type = CODES[dtype]
    tensor.shape.SetInParent()
    for size in shape:
        tensor.shape.dim.add(**({"dim_param": size} if isinstance(size, str) else {"dim_value": size}))
    return made


def int64_values(tensor: Any) -> list[int]:
    """Return the values of an int64 Tensor stored in the graph's file."""
    if tensor.raw_data:
        raw = tensor.raw_data
        return [int.from_bytes(raw[n : n + 8], "little", signed=True) for n in range(0, len(raw), 8)]
    return list(tensor.int64_data)


def stored_size(tensor: Any) -> int:
    """Return the bytes that the values of a Tensor occupy."""
    bits: int = prod(tensor.dims) * _WIDTHS.get(DTYPES.get(tensor.data_type, ""), 32)
    return (bits + 7) // 8


def stored_bytes(tensor: Any, folder: Path) -> bytes:
    """Return the values of a Tensor as stored, little-endian: in the graph's file, or in another file of `folder`.

    Raises GraphError if that file is missing or too short.
    """
    if not tensor.external_data:
        return np.array(tensor.float_data, np.float32).tobytes() if tensor.float_data else bytes(tensor.raw_data)
    place, again = {entry.key: entry.value for entry in tensor.external_data}, "copy or export the bundle again"
    path: Path = folder / place["location"]
    try:
        with path.open("rb") as file:
            file.seek(int(place.get("offset", 0)))
            data: bytes = file.read(stored_size(tensor))
    except OSError as error:
        raise GraphError(f"the weights {path} cannot be read: {error.strerror}", hint=again) from None
    if len(data) < stored_size(tensor):
        raise GraphError(f"the weights {path} end before {tensor.name}", hint=again)
    return data
