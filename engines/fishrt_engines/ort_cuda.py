"""ONNX Runtime sessions on a CUDA device: how they are set up, and what becomes of a portable graph.

    portable file ─► [build] ─► 16 bits ─► specialise ─► ONNX Runtime's optimiser ─► session ─► captured, launch by launch

A language model's graph is computed in bfloat16 where the device has it, else in float16; with quantised weights in float16, in
which ONNX Runtime has kernels that multiply by them directly. A codec's stays in float32, whose products tensor cores round to 10
bits of mantissa (TF32).

ONNX Runtime runs nodes that compute sizes on the CPU, by its own choice, so `session.disable_cpu_ep_fallback` would refuse every
graph of ours. What must not happen unseen is refused or told instead: a session that starts without the device raises an error,
other nodes on the CPU are named in a warning, and ONNX Runtime's own fall back, when a run fails, is switched off.

The device is the first that CUDA shows; CUDA_VISIBLE_DEVICES chooses it. Nothing in this file was run on a device by us.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from . import machine
from .errors import FishrtError, ProviderError
from .lower_precision import compute_in
from .onnx_proto import message, stored_size
from .ort_device import DeviceMemory
from .ort_session import Opened, find_weights, session_options
from .providers import find_obstacle, import_onnxruntime
from .shared_weights import share_weights
from .specialise import specialise

log = logging.getLogger(__name__)

PROVIDER = "CUDAExecutionProvider"
WORKSPACE = 1_000_000_000
"""Bytes that a session needs beside its weights, as an estimate: the CUDA context, libraries' workspaces, activations."""
_BFLOAT16_SINCE = (8, 0)
"""The compute capability from which on devices multiply bfloat16."""
_SIZE_OPERATORS = set("Shape Size Gather Slice Concat Squeeze Unsqueeze Reshape Cast Range Add Sub Mul Div Max Min Mod".split())
_SIZE_OPERATORS |= set("Where Equal Greater Less Expand ConstantOfShape ReduceProd ReduceMax Identity Neg Floor".split())
"""What ONNX Runtime runs on the CPU since it computes sizes, which are wanted there."""


def open_cuda(path: Path, *, threads: int, specialised: bool, build: Callable[[bytes], bytes] | None) -> Opened:
    """A session of the graph file `path` on the device. Raises what ONNX Runtime raises for a graph that it cannot load.

    specialised: compute a language model in 16 bits, in the fastest operators, and capture its calls of one column.
    build: makes the graph from the file's bytes; such a graph is a language model's, and all its calls are captured.
    Raises FishrtError where the device has too little memory, ProviderError where ONNX Runtime does not start there.
    """
    ort = import_onnxruntime("cuda")
    _preload(ort)
    gpu = next(iter(machine.gpus() or ()), None)
    model = build(path.read_bytes()) if build else path.read_bytes()
    columns = state_type = None
    captures = False
    if specialised:
        rewritten, columns = specialise(model, feed_rows=True)
        captures = build is not None or columns is not None
        if captures:
            precision = computed_in(model, gpu)
            log.info("%s runs in %s", path.name, precision)
            model, columns = specialise(compute_in(model, precision, path.parent), feed_rows=True)
            model = share_weights(model, path.parent)
            state_type = None if columns is None else precision
        else:
            model = rewritten
            if any(node.op_type == "TensorScatter" for node in message("Model").FromString(model).graph.node):
                log.warning("%s runs in float32 and node by node: its attention has no fast operator here", path.name)
    _check_room(path, model, gpu)
    options = session_options(ort, threads)
    # Without it, weights in 4 and 8 bits would be expanded in every run.
    options.add_session_config_entry("session.enable_dq_matmulnbits_fusion", "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    model = find_weights(model, path, options)
    session, captures = _session(ort, model, options, path.name, captures)
    _tell_cpu_nodes(session, path.name)
    run_options = (lambda graph: _run_options(ort, graph)) if captures else None
    return Opened(session, columns, device_memory(ort), state_type, run_options)


def computed_in(model: bytes, gpu: machine.Gpu | None) -> str:
    """The element type in which a language model's graph runs on a device."""
    graph = message("Model").FromString(model).graph
    if any(node.op_type == "DequantizeLinear" for node in graph.node):
        return "float16"
    if gpu is None:
        log.warning("nothing tells what device this is; computing in float16, as every one can")
        return "float16"
    return "bfloat16" if gpu.compute_capability >= _BFLOAT16_SINCE else "float16"


def provider_options(*, captures: bool) -> dict[str, str]:
    """What ONNX Runtime's CUDA provider is told; all that matters, since its defaults are made for fixed sizes.

    Not the device, which is the first by itself: with its number, ONNX Runtime 1.31 prints a warning for every session.
    """
    return {
        # The other strategy takes up to twice what is needed, and weights come in few large pieces.
        "arena_extend_strategy": "kSameAsRequested",
        # A codec's input has another length in every call; a search would be done for each.
        "cudnn_conv_algo_search": "HEURISTIC",
        "do_copy_in_default_stream": "1",
        "use_tf32": "1",
        "enable_cuda_graph": str(int(captures)),
    }


def _session(ort: Any, model: bytes, options: Any, name: str, captures: bool) -> tuple[Any, bool]:
    """A session on the device, and whether it captures its runs."""
    providers = [(PROVIDER, provider_options(captures=captures)), "CPUExecutionProvider"]
    try:
        session = ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        if not captures or "graph capture" not in str(error):
            raise
        log.warning("%s runs node by node, which is slower: ONNX Runtime cannot capture it (%s)", name, error)
        return _session(ort, model, options, name, False)
    if session.get_providers()[0] != PROVIDER:
        obstacle = find_obstacle("cuda")
        why = obstacle.what if obstacle else "its own messages, above, say why"
        raise ProviderError(
            f"ONNX Runtime could not start its CUDA provider for {name}: {why}",
            hint=(obstacle and obstacle.hint) or "`fishrt doctor` tells what is here",
        )
    session.disable_fallback()
    return session, captures


def _tell_cpu_nodes(session: Any, name: str) -> None:
    """Warns of nodes that run on the CPU, but for those that compute sizes."""
    found = Counter(
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != PROVIDER
        for node in part.get_nodes()
        if node.op_type not in _SIZE_OPERATORS
    )
    if found:
        listed = ", ".join(f"{count} {operator}" for operator, count in sorted(found.items()))
        log.warning("%s: ONNX Runtime has no CUDA kernel for some nodes and runs them on the CPU: %s", name, listed)


def _check_room(path: Path, model: bytes, gpu: machine.Gpu | None) -> None:
    """Raises FishrtError where the weights of a graph and what a session needs beside them are more than the device has free."""
    weights = sum(stored_size(tensor) for tensor in message("Model").FromString(model).graph.initializer)
    if gpu is None:
        log.info("%s has %s of weights; nothing tells how much memory the device has free", path.name, _gigabytes(weights))
    elif weights + WORKSPACE > gpu.free_bytes:
        raise FishrtError(
            f"{path.name} needs about {_gigabytes(weights + WORKSPACE)} of the device's memory, {_gigabytes(weights)} of it for "
            f"weights; {gpu.name} has {_gigabytes(gpu.free_bytes)} of {_gigabytes(gpu.total_bytes)} free",
            hint="end other programs that use the device (`nvidia-smi` lists them), export with --precision int8 or int4, "
            'or use provider "cpu"',
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _run_options(ort: Any, graph: int) -> Any:
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options


@cache
def device_memory(ort: Any) -> DeviceMemory:
    """The device's, one for all sessions."""
    return DeviceMemory(ort, "cuda", [(PROVIDER, provider_options(captures=False))])


@cache
def _preload(ort: Any) -> None:
    """Loads CUDA's libraries from where pip puts them. What is missing, `find_obstacle` has told before."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        ort.preload_dlls()
