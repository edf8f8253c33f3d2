"""ONNX Runtime sessions on a CPU: how they are set up, and the way from a portable graph to an optimised one.

portable file ─► specialise ─► ONNX Runtime's optimiser and packing ─► session
                                        └─► graph_cache ─► the next start maps it
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import graph_cache
from .providers import cpu_identity, import_onnxruntime
from .specialise import ColumnInputs, specialise

log = logging.getLogger(__name__)

WORTH_KEEPING = 32_000_000
"""Bytes of weights from which an optimised graph is kept on disk. Smaller ones are ready in a moment anyway."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A session, and what was made of its graph."""

    session: Any
    columns: ColumnInputs | None
    """As `specialise` gave them."""


def open_session(path: Path, *, threads: int, specialised: bool, identity: str | None) -> Opened:
    """A session of the graph file `path`. Raises what ONNX Runtime raises, which has no common base.

    specialised: rewrite it for this machine. identity: says what graph and weights are, as a hash; the optimised graph is kept
    under it.
    """
    ort = import_onnxruntime()
    if not specialised:
        options = _options(ort, threads)
        # In float32, as the file has it. ONNX Runtime's own choice for quantised weights is to round activations to 8 bits.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        return Opened(_session(ort, str(path), options), None)
    weights = path.with_name(f"{path.name}.data")
    if identity is None or not weights.is_file() or weights.stat().st_size < WORTH_KEEPING:
        return _optimised(ort, path, threads)
    key = graph_cache.cache_key(identity, ort.__version__, cpu_identity())
    kept = graph_cache.find(key)
    if kept is None:
        log.info("optimising %s for this machine, once; it is kept in %s", path.name, graph_cache.cache_folder())
        kept = _keep(ort, path, key)
    if kept is not None:
        options = _options(ort, threads)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            return Opened(_session(ort, str(kept.path), options), kept.columns)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            graph_cache.discard(key, f"cannot be loaded ({error})")
    return _optimised(ort, path, threads)


def _keep(ort: Any, path: Path, key: str) -> graph_cache.CachedGraph | None:
    rewritten, columns = specialise(path.read_bytes())

    def save(target: Path, weights: str) -> None:
        options = _options(ort, 1)
        options.optimized_model_filepath = str(target)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", weights)
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
        try:
            _from_bytes(ort, rewritten, path, options)
        except Exception as error:  # ONNX Runtime's exceptions have no common base; a full disk is one of them
            raise OSError(str(error)) from None

    return graph_cache.keep(key, columns, save)


def _optimised(ort: Any, path: Path, threads: int) -> Opened:
    rewritten, columns = specialise(path.read_bytes())
    return Opened(_from_bytes(ort, rewritten, path, _options(ort, threads)), columns)


def _from_bytes(ort: Any, model: bytes, path: Path, options: Any) -> Any:
    """A session of a specialised graph in memory whose weights lie beside `path`."""
    # Products with quantised weights in integers: activations are rounded to 8 bits, block by block.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    return _session(ort, model, options)


def _session(ort: Any, model: str | bytes, options: Any) -> Any:
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _options(ort: Any, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Idle threads that spin take the cores from the other session of the same loop: on two cores a loop of one large and nine
    # small calls was slower with spinning than without.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
