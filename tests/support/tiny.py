"""Tiny models in the official layout, and their exports: the golden checkpoints.

Tests reach these through the fixtures of conftest.py, so that each graph is exported once in a session.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fishrt.bundle.features import LanguageModel
from fishrt.bundle.folder import Bundle
from fishrt.language_model.batch import DualAR
from fishrt_engines import Engine, open_engine
from fishrt_export import Options, export_bundle
from fishrt_export.graph.job import GraphJob
from fishrt_export.models.codec.dac import Dac
from fishrt_export.models.codec.firefly import Firefly
from fishrt_export.models.fast_ar import FastAR
from fishrt_export.models.slow_ar import SlowAR
from fishrt_export.planning.dual_ar import halves_fit
from fishrt_export.sources.codec import CodecSource, open_codec
from fishrt_export.sources.language_model import LanguageModelSource, open_language_model
from fishrt_export.targets.forms import make_forms
from shared import identity, make_once, trace_together
from tolerances import TOLERANCES


class GoldenModel:
    """The modules, graphs and vectors of a golden folder, each made at its first use. All processes of a session share `folder`.

    Language model and codec are separate, since vectors of other sizes may not fit each other.
    """

    def __init__(self, golden: Path, folder: Path) -> None:
        self.golden, self.folder = golden, folder
        self._engines: dict[tuple[str, str, bool], Engine] = {}

    @cached_property
    def lm(self) -> LanguageModelSource:
        return open_language_model(self.checkpoint, codec=self.codec.kind)

    @cached_property
    def codec(self) -> CodecSource:
        return open_codec(self.golden / "codec/checkpoint")

    @cached_property
    def slow_ar(self) -> SlowAR:
        return self.lm.slow_ar("full")

    @cached_property
    def fast_ar(self) -> FastAR:
        return self.lm.fast_ar()

    @cached_property
    def codec_module(self) -> Dac | Firefly:
        return self.codec.module()

    @cached_property
    def fits(self) -> bool:
        """Return whether language model and codec can form one model."""
        return halves_fit(self.lm, self.codec)

    @cached_property
    def checkpoint(self) -> Path:
        """Return a checkpoint folder in the official layout, of language model and codec."""

        def join(folder: Path) -> None:
            for half in ("lm", "codec"):
                shutil.copytree(self.golden / half / "checkpoint", folder, dirs_exist_ok=True)

        return make_once(self.folder / "checkpoint", join)

    @cached_property
    def bundle(self) -> Bundle:
        """Return the bundle, of S2-Pro with forms for all devices: its frame graph, of ten codebooks, takes long to trace."""
        whole = self.golden.name == "s2-pro"
        options = Options(targets=("cuda", "tensorrt") if whole else ())
        path = self.folder / "bundle"
        if not path.exists():
            frame = [self.lm.frame_job(self.lm.describe("audio"), {})] if whole else []
            trace_together([*self.codec.jobs(), *self.lm.jobs("audio"), *frame])
        return Bundle.load(make_once(path, lambda folder: export_bundle(self.checkpoint, folder, options)))

    @property
    def few(self) -> LanguageModel:
        """Return the model with three codebooks: its frame graph has all that the family's has, and is traced soon."""
        return replace(self.lm.describe("audio"), num_codebooks=3)

    def file(self, role: str, head: str = "audio") -> Path:
        """Return the file of the exported graph: the bundle's, if there is a bundle."""
        job = self._job(role, head)
        if head == "audio" and self.fits:
            return self.bundle.file(job.spec.file)
        return self._exported(job, f"{role}-{head}")

    def engine(self, role: str, head: str = "audio", *, fast: bool = False) -> Engine:
        """Return an engine of the exported graph on the CPU: portable, or in its form for CPUs."""
        key = role, head, fast
        if key not in self._engines:
            spec = self._job(role, head).spec
            path = self.file(role, head)
            if fast:
                form = next(iter(make_forms(path.parent, role, spec, ["cpu"], hop=self.codec.config.hop)), None)
                spec = spec if form is None else form.spec
            self._engines[key] = open_engine(path.with_name(spec.file), spec, provider="cpu")
        return self._engines[key]

    def engine_of(self, source: LanguageModelSource, role: str, head: str, name: str) -> Engine:
        """Return an engine of a graph of other weights. name: of its file."""
        job = next(job for job in source.jobs(head) if job.role == role)
        return open_engine(self._exported(job, f"{role}-{head}-{name}"), job.spec, provider="cpu")

    def _exported(self, job: GraphJob, name: str) -> Path:
        def run(folder: Path) -> None:
            folder.mkdir()
            job.run(folder)

        return make_once(self.folder / name, run) / job.spec.file

    def dual_ar(self, head: str) -> DualAR:
        return DualAR(self.engine("slow_ar", head), self.engine("fast_ar"), self.lm.describe(head))

    def frame(self, lm: LanguageModel) -> Engine:
        """Return an engine of the frame graph of a model. See `LanguageModelSource.frame_job`."""
        return open_engine(self.frame_file(lm), self.lm.frame_job(lm, {}).spec, provider="cpu")

    def frame_file(self, lm: LanguageModel) -> Path:
        """Return the file of the frame graph of a model, beside the fast AR's."""
        job, fast = self.lm.frame_job(lm, {}), self.file("fast_ar", lm.head)

        def run(folder: Path) -> None:
            folder.mkdir()
            for file in (fast, fast.with_name(f"{fast.name}.data")):
                shutil.copyfile(file, folder / file.name)
            job.run(folder)

        return make_once(self.folder / f"frame-{identity(lm)}", run) / job.spec.file

    def _job(self, role: str, head: str) -> GraphJob:
        jobs = self.codec.jobs() if role.startswith("codec") else self.lm.jobs(head)
        return next(job for job in jobs if job.role == role)


def assert_same_table(actual: torch.Tensor, expected: np.ndarray) -> None:
    """Check that rotary tables of bfloat16 values are equal, except rare entries that are rounded the other way."""
    difference = np.abs(actual.numpy() - expected)
    assert difference.max() <= TOLERANCES["rope"]
    assert (difference > 0).sum() <= 1 + difference.size // 1000


def caches(spec_states: Any, **dims: int) -> list[torch.Tensor]:
    """Return caches of zeros for a torch module, from a spec's state tensors."""
    return [torch.zeros(tensor.resolve(dims)) for tensor in spec_states]


def prefill_feeds(prompts: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Return feeds of slow_ar for prompts int64 [1 + C, length] of any lengths, padded on the right with zeros."""
    lengths = np.array([prompt.shape[1] for prompt in prompts])
    longest = int(lengths.max())
    return {
        "prompt": np.stack([np.pad(prompt, ((0, 0), (0, longest - prompt.shape[1]))) for prompt in prompts]),
        "position_ids": np.tile(np.arange(longest), (len(prompts), 1)),
        "write_index": np.zeros(len(prompts), np.int64),
        "last_index": lengths - 1,
    }


def chunk_feeds(columns: np.ndarray, starts: np.ndarray) -> dict[str, np.ndarray]:
    """Return feeds of slow_ar for columns int64 [batch, 1 + C, length] at the positions from `starts` [batch] on."""
    length = columns.shape[2]
    return {
        "prompt": np.ascontiguousarray(columns),
        "position_ids": starts[:, None] + np.arange(length),
        "write_index": starts,
        "last_index": np.full(len(starts), length - 1),
    }
