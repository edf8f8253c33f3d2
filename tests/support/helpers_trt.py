"""A small graph of the kinds of state that bundles have, and a machine with a simulated GPU and TensorRT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fake_cuda_runtime import FakeCudaRuntime
from fake_tensorrt import FakeTensorRT
from fishrt_engines import GraphSpec, StatePair, TensorSpec, machine, providers
from fishrt_engines.trt.device import open_device
from fishrt_engines.trt.plans import LoweringOptions, PlanRequest, Profile

WIDTH, VOCABULARY = 4, 16
SPEC = GraphSpec(
    "small.onnx",
    (
        TensorSpec("tokens", "int64", ("batch", "length")),
        TensorSpec("write_index", "int64", ("batch",)),
        TensorSpec("key_cache.0", "float32", ("batch", 1, "cache", WIDTH)),
        TensorSpec("columns.0", "float32", ("batch", 1, WIDTH)),
    ),
    (
        TensorSpec("total", "float32", ("batch", WIDTH)),
        TensorSpec("each", "float32", ("batch", "length", WIDTH)),
        TensorSpec("key_cache_out.0", "float32", ("batch", 1, "cache", WIDTH)),
        TensorSpec("columns_out.0", "float32", ("batch", 1, WIDTH)),
    ),
    (StatePair("key_cache.0", "key_cache_out.0"), StatePair("columns.0", "columns_out.0")),
    identity="of the small graph",
)
"""A graph that writes tokens' vectors into its cache. total: sum over the cache plus `columns`, the sum of the previous call."""
STATELESS = GraphSpec(
    "double.onnx",
    (TensorSpec("x", "float32", ("batch", WIDTH)),),
    (TensorSpec("y", "float32", ("batch", WIDTH)),),
    identity="of the other graph",
)
ATTENTION = GraphSpec(
    "attention.onnx",
    (TensorSpec("q", "float32", ("batch", 2, 3, WIDTH)),),
    (TensorSpec("y", "float32", ("batch", 2, 3, WIDTH)),),
    identity="of the attention",
)


def write_small(folder: Path, *, op_type: str = "Identity") -> Path:
    """Write the graph of SPEC, with its weights in their own file. op_type: of one more node in the graph."""
    folder.mkdir(parents=True, exist_ok=True)
    table = np.random.default_rng(3).normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["each"]),
        helper.make_node("Unsqueeze", ["each", "one"], ["heads"]),
        helper.make_node("TensorScatter", ["key_cache.0", "heads", "write_index"], ["key_cache_out.0"], axis=-2),
        helper.make_node("ReduceSum", ["key_cache_out.0", "rows"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["columns.0", "one"], ["before"], keepdims=0),
        helper.make_node("Add", ["sum", "before"], ["summed"]),
        helper.make_node(op_type, ["summed"], ["total"], name="the_node"),
        helper.make_node("ReduceSum", ["heads", "axis"], ["now"], keepdims=0),
        # Written after `columns.0` is read: on the CPU, both share memory.
        helper.make_node("Sub", ["before", "before"], ["nothing"]),
        helper.make_node("Unsqueeze", ["nothing", "one"], ["nothing_more"]),
        helper.make_node("Add", ["now", "nothing_more"], ["columns_out.0"]),
    ]
    constants = {"table": table, "one": np.array([1]), "rows": np.array([1, 2]), "axis": np.array([2])}
    return _write(folder, SPEC, nodes, constants, external=["table"])


def write_double(folder: Path) -> Path:
    """Write the graph of STATELESS: y = 2 x."""
    folder.mkdir(parents=True, exist_ok=True)
    return _write(folder, STATELESS, [helper.make_node("Add", ["x", "x"], ["y"])], {})


def write_attention(folder: Path) -> Path:
    """Write the graph of ATTENTION: each of two heads reads its own three positions."""
    folder.mkdir(parents=True, exist_ok=True)
    return _write(folder, ATTENTION, [helper.make_node("Attention", ["q", "q", "q"], ["y"])], {})


def _write(folder: Path, spec: GraphSpec, nodes: list[Any], constants: dict[str, Any], external: Any = ()) -> Path:
    types = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT}
    inputs, outputs = (
        [helper.make_tensor_value_info(t.name, types[t.dtype], t.shape) for t in tensors]
        for tensors in (spec.inputs, spec.outputs)
    )
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "small", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    path = folder / spec.file
    for tensor in model.graph.initializer:
        if tensor.name in external:
            onnx.external_data_helper.set_external_data(tensor, f"{spec.file}.data")
    onnx.save(model, path)
    return path


def profiles(*, batch: int = 1, longest: int = 8) -> tuple[Profile, ...]:
    batches = (1, 1, batch)
    return Profile("prefill", {"batch": batches, "length": (2, 4, longest)}), Profile(
        "step", {"batch": batches, "length": (1, 1, 1)}
    )


def request_for(path: Path, *, max_len: int = 12, precision: str = "fp32", **changes: Any) -> PlanRequest:
    options = LoweringOptions(max_len, precision, fp32_attention=precision == "fp16", primitive_attention=False)
    spec = next(spec for spec in (SPEC, STATELESS, ATTENTION) if spec.file == path.name)
    wanted = profiles() if spec is SPEC else (Profile("any", {"batch": (1, 1, 1)}),)
    return PlanRequest(path, **{"spec": spec, "lowering": options, "profiles": wanted, **changes})


@dataclass
class Simulated:
    """The parts of a simulated machine."""

    cuda: FakeCudaRuntime
    trt: FakeTensorRT


@contextmanager
def simulated(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, version: str = "11.4.0.106", **device: Any
) -> Iterator[Simulated]:
    """Simulate a machine whose caches are in `folder`. Arguments: of FakeTensorRT and FakeCudaRuntime."""
    cuda = FakeCudaRuntime(**device)
    trt = FakeTensorRT(cuda, version)
    modules: dict[str, Any] = {"tensorrt": trt, "cuda.bindings.runtime": cuda}
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(__import__("sys").modules, name, module)
    monkeypatch.setenv("FISHRT_CACHE", str(folder))
    monkeypatch.setattr(machine, "driver_error", lambda: None)
    monkeypatch.setattr(machine, "gpus", lambda: (object(),))
    monkeypatch.setattr(providers, "_usable", set())
    open_device.cache_clear()
    yield Simulated(cuda, trt)
    open_device.cache_clear()
