"""The cases that verify the graphs of a diffusion model: several lengths, batches, rows of guidance, masks, start positions."""

from __future__ import annotations

import numpy as np

from fishrt_engines import Array
from fishrt_engines.engine import GraphSpec, TensorSpec

from ..graph.report import Case

_BYTES = 256
_SIZES: dict[str, tuple[dict[str, int], ...]] = {
    "text_cond": ({"batch": 1, "tokens": 1}, {"batch": 3, "tokens": 9}, {"batch": 1, "tokens": 70}),
    "speaker_cond": ({"batch": 1, "patches": 1}, {"batch": 2, "patches": 5}, {"batch": 1, "patches": 40}),
    "schedule": ({"steps": 1}, {"steps": 9}),
    "denoise": (
        {"batch": 1, "rows": 1, "frames": 1, "tokens": 1, "patches": 1, "prefix": 1, "start": 0},
        {"batch": 3, "rows": 1, "frames": 5, "tokens": 7, "patches": 2, "prefix": 3, "start": 9},
        {"batch": 2, "rows": 3, "frames": 12, "tokens": 19, "patches": 6, "prefix": 1, "start": 0},
        {"batch": 1, "rows": 3, "frames": 40, "tokens": 33, "patches": 3, "prefix": 8, "start": 32},
    ),
}
_SIZES["latent_cond"] = _SIZES["speaker_cond"]


def diffusion_cases(role: str, spec: GraphSpec, patch: int) -> list[Case]:
    """Return the cases of a role's graph. patch: latent frames of one position."""
    rng = np.random.default_rng(6)
    cases = []
    for sizes in _SIZES[role]:
        dims = {"frames": patch * sizes.get("patches", 0), **sizes}
        cases.append(Case(({tensor.name: _values(tensor, dims, patch, rng) for tensor in spec.feeds},), {}))
    return cases


def _values(tensor: TensorSpec, dims: dict[str, int], patch: int, rng: np.random.Generator) -> Array:
    """Return random values of an input. Masks hide parts of it, and with rows all of it from some rows."""
    shape, name = tensor.resolve(dims), tensor.name
    if name == "tokens":
        return rng.integers(0, _BYTES, shape)
    if name == "position_ids":
        return np.broadcast_to(dims["start"] + np.arange(shape[1]), shape).copy()
    if name == "latent_mask":
        return np.broadcast_to(patch * np.arange(shape[1]) < dims["start"], shape).copy()
    if name.endswith("mask"):
        lengths = rng.integers(1, shape[-1] + 1, (shape[0], *[1] * (len(shape) - 1)))
        mask = np.broadcast_to(np.arange(shape[-1]) < lengths, shape).copy()
        if len(shape) == 3:
            mask[:, {"text_mask": 1, "speaker_mask": 2}[name] :: 3] = False
        return mask
    if name == "t":
        return np.linspace(0.999, 0.01, shape[0], dtype=np.float32)
    if name == "speaker_scale":
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    scale = 0.3 if name == "modulation" else 1.0
    return (scale * rng.standard_normal(shape)).astype(np.float32)
