"""The part of the ONNX file format that `specialise` reads and writes.

A graph's file without its weights is small protobuf. ONNX Runtime brings the protobuf library but not the `onnx` package, which
would add a fifth to an installation; so the messages that are needed are declared here, with the field numbers of `onnx.proto`.
Whatever else a file holds is kept as it is: protobuf passes unknown fields through.
"""

from __future__ import annotations

from functools import cache
from typing import Any

_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "Model": {"graph": (7, "Graph"), "opset_import": (8, "*OperatorSet")},
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
        "ints": (8, "*int64"),
        "type": (20, "int32"),
    },
    "Tensor": {
        "dims": (1, "*int64"),
        "data_type": (2, "int32"),
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
"""Message → field → its number and type; a star marks a repeated field."""

ATTRIBUTE_FLOAT, ATTRIBUTE_INT = 1, 2
TENSOR_INT32, TENSOR_INT64 = 6, 7


def message(name: str) -> Any:
    """The class of one of the messages above."""
    return _classes()[f"fishrt_onnx.{name}"]


@cache
def _classes() -> dict[str, Any]:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

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


def node(op_type: str, inputs: list[str], outputs: list[str], *, domain: str = "", **attributes: float | int) -> Any:
    """A Node with integer and float attributes. An empty input name means that an optional input is left out."""
    made = message("Node")(op_type=op_type, name=f"{op_type}.{outputs[0]}", domain=domain, input=inputs, output=outputs)
    for key, value in attributes.items():
        if isinstance(value, float):
            made.attribute.add(name=key, type=ATTRIBUTE_FLOAT, f=value)
        else:
            made.attribute.add(name=key, type=ATTRIBUTE_INT, i=value)
    return made


def int64_tensor(name: str, values: list[int], *, scalar: bool = False) -> Any:
    """A Tensor of int64, of rank 1, or 0 for a `scalar`."""
    return message("Tensor")(name=name, data_type=TENSOR_INT64, dims=[] if scalar else [len(values)], int64_data=values)


def int64_values(tensor: Any) -> list[int]:
    """The values of a Tensor of int64 that lies in the file itself."""
    if tensor.raw_data:
        raw = tensor.raw_data
        return [int.from_bytes(raw[n : n + 8], "little", signed=True) for n in range(0, len(raw), 8)]
    return list(tensor.int64_data)
