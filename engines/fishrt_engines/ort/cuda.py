"""ONNX Runtime sessions on a CUDA device: their options, and the checks of what a session runs where.

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
from functools import cache
from pathlib import Path
from typing import Any

from .. import machine
from ..engine import GraphSpec
from ..errors import FishrtError, ProviderError
from ..providers import find_obstacle, import_onnxruntime
from .session import Opened, graph_source, session_options, weight_bytes
from .tensors import DeviceMemory

log = logging.getLogger(__name__)

PROVIDER = "CUDAExecutionProvider"
WORKSPACE = 1_000_000_000
"""Estimated bytes that a session needs in addition to its weights: the CUDA context, workspaces of libraries, activations."""
_SIZE_OPERATORS = set("Shape Size Gather Slice Concat Squeeze Unsqueeze Reshape Cast Range Add Sub Mul Div Max Min Mod".split())
_SIZE_OPERATORS |= set("Where Equal Greater Less Expand ConstantOfShape ReduceProd ReduceMax Identity Neg Floor".split())
"""Operators that compute sizes: ONNX Runtime runs them on the CPU, where the sizes are needed."""


def open_cuda(path: Path, spec: GraphSpec, *, threads: int) -> Opened:
    """Open a session of the graph file `path` on the device. ONNX Runtime's errors for a graph that it cannot load go through.

    Raises FishrtError if the device has too little memory, ProviderError if ONNX Runtime does not start on it.
    """
    ort = import_onnxruntime("cuda")
    _preload(ort)
    _check_room(path, next(iter(machine.gpus() or ()), None))
    options = session_options(ort, threads)
    # Without this, weights in 4 and 8 bits would be expanded in every run.
    options.add_session_config_entry("session.enable_dq_matmulnbits_fusion", "1")
    # Weights lie in memory of their own, so that the arena holds no unused half of a large piece.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session, captures = _session(ort, graph_source(path, options), options, path.name, is_captured(spec))
    _warn_of_cpu_nodes(session, path.name)
    run_options = (lambda graph: _run_options(ort, graph)) if captures else None
    return Opened(session, device_memory(ort), run_options)


def is_captured(spec: GraphSpec) -> bool:
    """Return whether runs of a graph are captured, since few shapes come: steps of a language model, and graphs without state
    whose results have one size for each batch."""
    of_results = {dim for tensor in spec.outputs for dim in tensor.shape if isinstance(dim, str)}
    return spec.columns is not None or (not spec.states and of_results == {"batch"})


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
        # Flash, memory-efficient and unfused attention. By default, new devices take cuDNN, which plans anew for each length.
        "sdpa_kernel": "19",
        "enable_cuda_graph": str(int(captures)),
    }


def _session(ort: Any, model: str | bytes, options: Any, name: str, captures: bool) -> tuple[Any, bool]:
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
            hint=obstacle.hint if obstacle else None,
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


def _check_room(path: Path, gpu: machine.Gpu | None) -> None:
    """Check that the device has free memory for the weights of a graph and WORKSPACE. Raises FishrtError otherwise."""
    weights = weight_bytes(path) + path.stat().st_size
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
