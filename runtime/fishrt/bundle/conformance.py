"""Checks of a bundle against TensorRT's documented rules: each graph is lowered as for a plan, then checked.

They need neither TensorRT nor a GPU. See fishrt_engines.rewrite.tensorrt_rules for the limits of such a proof.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fishrt_engines import GraphError
from fishrt_engines.engine import GraphSpec
from fishrt_engines.rewrite.onnx_proto import parse_model
from fishrt_engines.rewrite.tensorrt import PRECISIONS, LoweringOptions, lower_for_tensorrt
from fishrt_engines.rewrite.tensorrt_rules import Finding, check_for_tensorrt

from ..language_model.frame import frame_model, frame_spec
from .folder import Bundle

FRAME = "frame"
"""The role of the frame graph, which is built from the fast AR and has no file."""


def tensorrt_findings(bundle: Bundle) -> dict[str, list[Finding]]:
    """Return the findings about each lowered graph, by role: broken rules, and notes; see tensorrt_rules.Finding.

    The language model's graphs are checked in every precision, the codec's in float32, in which they stay. Raises GraphError for
    a damaged file.
    """
    graphs, lm = bundle.manifest.specs, bundle.manifest.model
    models = {role: bundle.file(spec.file).read_bytes() for role, spec in graphs.items()}
    frame = frame_spec(graphs["slow_ar"], graphs["fast_ar"], lm)
    checked = {
        **{role: (models[role], spec) for role, spec in graphs.items()},
        FRAME: (frame_model(models["fast_ar"], graphs["fast_ar"], frame, lm), frame),
    }
    return {
        role: _findings(model, spec, bundle.path, ["fp32"] if role.startswith("codec") else PRECISIONS, lm.max_seq_len)
        for role, (model, spec) in checked.items()
    }


def _findings(model: bytes, spec: GraphSpec, folder: Path, precisions: Iterable[str], max_len: int) -> list[Finding]:
    """Return the findings about one graph, each once, errors first. A graph that cannot be lowered is an error."""
    parse_model(model, spec.file)
    found: dict[Finding, None] = {}
    for precision in precisions:
        options = LoweringOptions(max_len, precision, fp32_attention=precision == "fp16", primitive_attention=False)
        try:
            found |= dict.fromkeys(check_for_tensorrt(*lower_for_tensorrt(model, spec, options, folder)))
        except GraphError as error:
            found[Finding("error", "", "", "lowering", str(error), "fishrt")] = None
    return sorted(found, key=lambda finding: finding.severity)
