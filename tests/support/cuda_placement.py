"""Where ONNX Runtime runs each node of a graph on a CUDA device, and where it copies values between device and host.

A node whose CUDA kernel leaves its result on the host (Shape) is followed by nodes that compute sizes. ONNX Runtime moves such a
node to the CPU if all it reads is on the host, unless its CUDA kernel reads these inputs there itself. A value that is made on
one side and read on the other costs a Memcpy node, which no CUDA graph can contain. This repeats `GetCpuPreferredNodes` and
`MemcpyTransformer` of ONNX Runtime 1.31.
"""

from __future__ import annotations

import heapq
from math import prod
from pathlib import Path

import onnx

HOST_OUTPUTS = ("Shape", "Size")
HOST_INPUTS = {
    "Clip": (1, 2),
    "ConstantOfShape": (0,),
    "CumSum": (1,),
    "Expand": (1,),
    "GroupQueryAttention": (6,),
    "Pad": (1, 2, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
    **dict.fromkeys(("ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"), (1,)),
}
"""Inputs that the CUDA kernel of an operator reads on the host."""
WITHOUT_KERNEL = {("", "Swish")}
SMALL = 100
"""Most elements of an initializer that keeps no node from the CPU."""
_HALVES = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}


def copied_values(path: Path) -> list[str]:
    """Return the names of the values for which ONNX Runtime would add a Memcpy node. The nodes must be in topological order."""
    graph = onnx.load(path, load_external_data=False).graph
    constants = {t.name: prod(t.dims) for t in graph.initializer}
    halves = {t.name for t in graph.initializer if t.data_type in _HALVES}
    halves |= {i.name for i in graph.input if i.type.tensor_type.elem_type in _HALVES}
    nodes = []
    for node in graph.node:  # what depends on constants alone is computed when the graph is loaded
        if all(name in constants or not name for name in node.input):
            constants |= dict.fromkeys(node.output, SMALL + 1)
        else:
            nodes.append(node)
    inputs = {i.name for i in graph.input}
    readers: dict[str, list[int]] = {}
    for at, node in enumerate(nodes):
        for name in node.input:
            readers.setdefault(name, []).append(at)
    on_device = [(node.domain, node.op_type) not in WITHOUT_KERNEL for node in nodes]
    on_host = {name for node in nodes if node.op_type in HOST_OUTPUTS for name in node.output}
    waiting = sorted({at for name in on_host for at in readers.get(name, [])})
    seen = set(waiting)
    while waiting:
        at = heapq.heappop(waiting)
        node = nodes[at]
        if on_device[at] and all(_stays(node, n, name, constants, inputs, halves, on_host) for n, name in enumerate(node.input)):
            on_device[at] = False
            on_host.update(node.output)
            for later in {r for name in node.output for r in readers.get(name, [])} - seen:
                seen.add(later)
                heapq.heappush(waiting, later)
    made_there, made_here, read_there, read_here = set(inputs), set(inputs), set[str](), set[str]()
    for device, node in zip(on_device, nodes, strict=True):
        for n, name in enumerate(node.input):
            (read_there if device and n not in HOST_INPUTS.get(node.op_type, ()) else read_here).add(name)
        (made_there if device and node.op_type not in HOST_OUTPUTS else made_here).update(node.output)
    both = inputs & read_there & read_here
    return sorted((both | (made_here - inputs) & read_there | (made_there - inputs) & read_here) - {""})


def _stays(
    node: onnx.NodeProto, n: int, name: str, constants: dict[str, int], inputs: set[str], halves: set[str], on_host: set[str]
) -> bool:
    """Return whether one input of a node lets it run on the CPU."""
    if not name:
        return True
    if name in halves:
        return False
    if name in inputs or constants.get(name, SMALL + 1) <= SMALL:
        return True
    return name in on_host and n not in HOST_INPUTS.get(node.op_type, ())
