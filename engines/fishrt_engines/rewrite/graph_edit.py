"""Rewriting of a graph: the producer and the readers of each value, and the way back into a valid file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class GraphEditor:
    """One graph of a Model message; see `onnx_proto`. Weights are untouched: they stay in their own file.

    Nodes may be changed in place, or `nodes` replaced; then `index` finds producers and readers anew. `finish` writes all back.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.graph = model.graph
        self.nodes: list[Any] = list(self.graph.node)
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.inputs = {value.name: value for value in self.graph.input}
        self.outputs = {value.name: value for value in self.graph.output}
        self._makers: dict[str, Any] = {}
        self._readers: dict[str, list[Any]] = {}
        self.index()

    def index(self) -> None:
        """Find the producer and the readers of each value."""
        self._makers = {name: node for node in self.nodes for name in node.output if name}
        self._readers = {}
        for node in self.nodes:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def made_by(self, name: str, op_type: str | None = None) -> Any:
        """Return the node that produces a value; None if there is none, or if it is another operator."""
        maker = self._makers.get(name)
        return maker if maker is not None and op_type in (None, maker.op_type) else None

    def readers(self, name: str) -> list[Any]:
        """Return the nodes that read a value, each as often as it reads it."""
        return self._readers.get(name, [])

    def only_reader(self, name: str, op_type: str, perm: list[int] | None = None) -> Any:
        """Return the only node that reads a value, if it is this operator (with this `perm`); else None."""
        readers = self.readers(name)
        fits = len(readers) == 1 and readers[0].op_type == op_type and name not in self.outputs
        return readers[0] if fits and (perm is None or ints(readers[0], "perm") == perm) else None

    def is_constant(self, name: str) -> bool:
        """Return whether a value is an initializer, or one cast or dequantised."""
        maker = self.made_by(name)
        if maker is not None and maker.op_type in ("Cast", "DequantizeLinear"):
            return maker.input[0] in self.constants
        return name in self.constants

    def constant(self, tensor: Any) -> str:
        """Add an initializer, unless one of its name exists. Return the name."""
        if tensor.name not in self.constants:
            self.constants[tensor.name] = tensor
        return str(tensor.name)

    def use_opset(self, domain: str, version: int) -> None:
        """Declare an operator set, unless its domain is declared."""
        if not any(opset.domain == domain for opset in self.model.opset_import):
            self.model.opset_import.add(domain=domain, version=version)

    def finish(self) -> bytes:
        """Return the bytes of the file, without unused nodes and initializers, in topological order."""
        wanted, kept = set(self.outputs), []
        for node in reversed(_sorted(self.nodes)):
            if wanted.intersection(node.output):
                kept.append(node)
                wanted.update(node.input)
        self.nodes = kept[::-1]
        used = [tensor for name, tensor in self.constants.items() if name in wanted]
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        del self.graph.initializer[:]
        self.graph.initializer.extend(used)
        return bytes(self.model.SerializeToString())


def attribute(node: Any, name: str, default: Any) -> Any:
    """Return a node's attribute that is a number."""
    for found in node.attribute:
        if found.name == name:
            return found.f if found.type == 1 else found.i
    return default


def ints(node: Any, name: str) -> list[int]:
    """Return a node's attribute that is a list of integers; empty if it has none."""
    return next((list(found.ints) for found in node.attribute if found.name == name), [])


def _sorted(nodes: Iterable[Any]) -> list[Any]:
    """Return the nodes in topological order. Raises ValueError for a cycle."""
    waiting = list(nodes)
    makers = {name for node in waiting for name in node.output if name}
    made: set[str] = set()
    done: list[Any] = []
    while waiting:
        ready, later = [], []
        for node in waiting:
            if all(name in made or name not in makers for name in node.input):
                ready.append(node)
                made.update(node.output)
            else:
                later.append(node)
        if not ready:
            raise ValueError("the graph has a cycle")
        done += ready
        waiting = later
    return done
