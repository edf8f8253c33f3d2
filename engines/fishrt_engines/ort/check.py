"""Checks of a session against the description of its graph."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from ..spec import GraphSpec, TensorSpec

_DTYPES = {"float": "float32", "double": "float64"}
"""Element types whose name in ONNX Runtime is not numpy's."""


def element_type(node: Any) -> str:
    """Return numpy's name of the element type of a session's input or output."""
    name = str(node.type).removeprefix("tensor(").removesuffix(")")
    return _DTYPES.get(name, name)


def inconsistencies(spec: GraphSpec) -> list[str]:
    """Return the faults of the description itself."""
    inputs, outputs = ({t.name: t for t in tensors} for tensors in (spec.inputs, spec.outputs))
    wrong = []
    for pair in spec.states:
        before, after = inputs.get(pair.input), outputs.get(pair.output)
        if before is None or after is None:
            wrong.append(f"the state {pair.input} → {pair.output} names a tensor that is not listed")
        elif (before.dtype, before.shape) != (after.dtype, after.shape):
            wrong.append(f"the state {pair.input} → {pair.output} changes its dtype or shape")
    return wrong


def differences(spec: GraphSpec, session: Any, added: Collection[str], state_type: str | None) -> list[str]:
    """Return the differences between a session's tensors and the described ones.

    added: inputs that a rewrite of the graph added. state_type: the state's element type after the rewrite; None if unchanged.
    Fixed sizes are compared. Names of symbolic dimensions are not, since ONNX Runtime renames those that it computes.
    """
    carried = {name for pair in spec.states for name in (pair.input, pair.output)}
    found = []
    for kind, described, nodes in (
        ("input", spec.inputs, session.get_inputs()),
        ("output", spec.outputs, session.get_outputs()),
    ):
        in_file = {node.name: node for node in nodes if node.name not in added}
        by_name = {t.name: t for t in described}
        found += [f"{kind} {name} is missing" for name in by_name if name not in in_file]
        found += [f"{kind} {name} is not described" for name in in_file if name not in by_name]
        for name in by_name.keys() & in_file.keys():
            wanted = by_name[name]
            if state_type is not None and name in carried:
                wanted = replace(wanted, dtype=state_type)
            found += _tensor_differences(f"{kind} {name}", wanted, element_type(in_file[name]), in_file[name].shape)
    return sorted(found)


def _tensor_differences(what: str, described: TensorSpec, dtype: str, shape: Sequence[int | str | None]) -> list[str]:
    if dtype != described.dtype:
        return [f"{what} is {dtype} instead of {described.dtype}"]
    same = len(shape) == len(described.shape) and all(
        in_file == wanted or not isinstance(in_file, int) for in_file, wanted in zip(shape, described.shape, strict=True)
    )
    return [] if same else [f"{what} has shape {list(shape)} instead of {list(described.shape)}"]
