"""ONNX Runtime sessions on a CUDA device: their options, and the steps from a portable graph to a session.

    portable file ─► [build] ─► 16 bits ─► specialise ─► ONNX Runtime's optimiser ─► session ─► captured, launch by launch

A language model's graph is computed in bfloat16 if the device supports it, else in float16. With quantised weights it is computed
in float16, for which ONNX Runtime has kernels that multiply by them directly. A codec's graph stays in float32; its products are
rounded to 10 bits of mantissa (TF32) on tensor cores.

ONNX Runtime runs nodes that compute sizes on the CPU, by its own choice, so `session.disable_cpu_ep_fallback` would refuse every
graph of fishrt. Three measures replace it: a session that starts without the device raises an error, other nodes on the CPU are
named in a warning, and ONNX Runtime's fallback after a failed run is switched off.

The device is the first visible one; CUDA_VISIBLE_DEVICES chooses it. Tests run this file with a simulation of CUDA only.
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

from .. import machine
from ..errors import FishrtError, ProviderError
from ..providers import find_obstacle, import_onnxruntime
from ..rewrite.attention import specialise
from ..rewrite.onnx_proto import message, stored_size
from ..rewrite.precision import compute_in
from ..rewrite.shared_weights import share_weights
from .session import Opened, find_weights, session_options
from .tensors import DeviceMemory

log = logging.getLogger(__name__)

PROVIDER = "CUDAExecutionProvider"
WORKSPACE = 1_000_000_000
"""Estimated bytes that a session needs in addition to its weights: the CUDA context, workspaces of libraries, activations."""
_BFLOAT16_SINCE = (8, 0)
"""The lowest compute capability with products in bfloat16."""
_SIZE_OPERATORS = set("Shape Size Gather Slice Concat Squeeze Unsqueeze Reshape Cast Range Add Sub Mul Div Max Min Mod".split())
_SIZE_OPERATORS |= set("Where Equal Greater Less Expand ConstantOfShape ReduceProd ReduceMax Identity Neg Floor".split())
"""Operators that compute sizes: ONNX Runtime runs them on the CPU, where the sizes are needed."""


def open_cuda(path: Path, *, threads: int, specialised: bool, build: Callable[[bytes], bytes] | None) -> Opened:
    """Open a session of the graph file `path` on the device. ONNX Runtime's errors for a graph that it cannot load go through.

    specialised: compute a language model in 16 bits, in the fastest operators, and capture its calls of one column.
    build: makes the graph from the file's bytes; such a graph is a language model's, and all its calls are captured.
    Raises FishrtError if the device has too little memory, ProviderError if ONNX Runtime does not start on it.
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
    # Without this, weights in 4 and 8 bits would be expanded in every run.
    options.add_session_config_entry("session.enable_dq_matmulnbits_fusion", "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    model = find_weights(model, path, options)
    session, captures = _session(ort, model, options, path.name, captures)
    _warn_of_cpu_nodes(session, path.name)
    run_options = (lambda graph: _run_options(ort, graph)) if captures else None
    return Opened(session, columns, device_memory(ort), state_type, run_options)


def computed_in(model: bytes, gpu: machine.Gpu | None) -> str:
    """Return the element type in which a language model's graph is computed on a device."""
    graph = message("Model").FromString(model).graph
    if any(node.op_type == "DequantizeLinear" for node in graph.node):
        return "float16"
    if gpu is None:
        log.warning("the device cannot be identified; computing in float16, which every device supports")
        return "float16"
    return "bfloat16" if gpu.compute_capability >= _BFLOAT16_SINCE else "float16"


def provider_options(*, captures: bool) -> dict[str, str]:
    """Return the options of ONNX Runtime's CUDA provider: all that matter, since the defaults are made for fixed sizes.

    `device_id` is left at its default, the first device: if it is given, ONNX Runtime 1.31 prints a warning for every session.
    """
    return {
        # The default strategy allocates up to twice the need; weights come in few large pieces.
        "arena_extend_strategy": "kSameAsRequested",
        # The length of a codec's input varies, and each new length would start an exhaustive search.
        "cudnn_conv_algo_search": "HEURISTIC",
        "do_copy_in_default_stream": "1",
        "use_tf32": "1",
        "enable_cuda_graph": str(int(captures)),
    }


def _session(ort: Any, model: bytes, options: Any, name: str, captures: bool) -> tuple[Any, bool]:
    """Return a session on the device, and whether it captures its runs."""
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
        why = obstacle.what if obstacle else "its own messages above give the reason"
        raise ProviderError(
            f"ONNX Runtime could not start its CUDA provider for {name}: {why}",
            hint=(obstacle and obstacle.hint) or "run `fishrt doctor` for details",
        )
    session.disable_fallback()
    return session, captures


def _warn_of_cpu_nodes(session: Any, name: str) -> None:
    """Warn of nodes that run on the CPU, except those that compute sizes."""
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
    """Check that the device has free memory for the weights of a graph and WORKSPACE. Raises FishrtError otherwise."""
    weights = sum(stored_size(tensor) for tensor in message("Model").FromString(model).graph.initializer)
    if gpu is None:
        log.info("%s has %s of weights; the free memory of the device is unknown", path.name, _gigabytes(weights))
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
    """Return the device's memory, one object for all sessions."""
    return DeviceMemory(ort, "cuda", [(PROVIDER, provider_options(captures=False))])


@cache
def _preload(ort: Any) -> None:
    """Load CUDA's libraries as installed by pip. `find_obstacle` has already reported missing ones."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints every library that it does not find
        ort.preload_dlls()
