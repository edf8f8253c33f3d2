"""The error of rounded weights over a whole utterance: its latents by a bundle's graphs and by the checkpoint's own weights.

Both have the runtime's sampler, the same noise, text and voice. The graphs are the forms that speak on this CPU. The module with
the checkpoint's weights is computed in stretches, and one graph at a time is open, so that the memory is that of verification.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import cast

import numpy as np

from fishrt.arrays import Floats
from fishrt.bundle.diffusion import Diffusion
from fishrt.bundle.folder import Bundle
from fishrt.bundle.graphs import BundleGraphs
from fishrt.bundle.quantisation import UtteranceError
from fishrt.diffusion.denoising import Denoising
from fishrt.diffusion.generate import Denoiser, Utterance
from fishrt.diffusion.text import tokens
from fishrt_engines import Array, Engine
from fishrt_engines.machine import available_memory

from ..checkpoint.weights import load
from ..models.stack import Stack
from .job import GraphJob
from .report import PROVIDER
from .stretches import run_in_stretches
from .verify import run_module

log = logging.getLogger(__name__)

_TEXT, _PATCHES = "[S1] This is how a sentence of some words begins.", 16
_FRAMES, _STEPS = 32, 8
"""Those of the first block of a stream."""


def utterance_error(jobs: Mapping[str, GraphJob], bundle: Bundle) -> UtteranceError | None:
    """Return the error of a short utterance; None, with a warning, if there is too little memory for one of the graphs.

    jobs: those of the model's graphs, by role. bundle: with the graphs written.
    """
    model, need = bundle.manifest.diffusion, max(bundle.manifest.graphs[role].memory for role in jobs)
    available = available_memory()
    if available is not None and need > available:
        log.warning("the error of an utterance was not measured: a graph needs %.1f GB of memory", need / 1e9)
        return None
    exact = _latents(cast(Mapping[str, Engine], {role: _Module(job) for role, job in jobs.items()}), model)
    found = _latents(_Newest(bundle), model)
    error = float(np.sqrt(np.square(found - exact).mean() / np.square(exact).mean()))
    return UtteranceError(error, len(exact), _STEPS, PROVIDER)


def _latents(engines: Mapping[str, Engine], model: Diffusion) -> Floats:
    """Return all latents of the utterance, float32 [frames, channels]."""
    denoiser, rng = Denoiser(engines, model), np.random.default_rng(1)
    voice = denoiser.voice(rng.standard_normal((_PATCHES * model.patch, model.channels), np.float32))
    settings = Denoising(_STEPS, frames=min(_FRAMES, model.max_frames)).resolve(model)
    utterance = Utterance(denoiser, tokens(_TEXT), voice, settings, 0)
    while utterance.stop_reason is None:
        utterance.advance()
    return utterance.latents


class _Module:
    """A module with the checkpoint's weights, called as an engine is."""

    def __init__(self, job: GraphJob) -> None:
        self._job = job

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See `Engine.run`."""
        job, module, given = self._job, self._job.build(), {name: np.array(feed) for name, feed in feeds.items()}
        if isinstance(module, Stack):
            build: Callable[[], Stack] = job.build  # type: ignore[assignment]
            return run_in_stretches(build, job.spec, job.weights, given)
        return run_module(load(module, job.weights), job.spec, given)[0]


class _Newest(Mapping[str, Engine]):
    """The graphs of a bundle, of which the one that was accessed last is open."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._open: tuple[str, Engine] | None = None

    def __getitem__(self, role: str) -> Engine:
        if self._open is None or self._open[0] != role:
            self._open = None  # closed before the next is opened
            self._open = (role, BundleGraphs(self._bundle, PROVIDER, None)[role])
        return self._open[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bundle.manifest.graphs)

    def __len__(self) -> int:
        return len(self._bundle.manifest.graphs)
