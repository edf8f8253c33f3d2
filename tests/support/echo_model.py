"""The tiny diffusion model of the golden vectors: its checkpoint, its modules and its exported graphs, each made at first use."""

from __future__ import annotations

import json
import shutil
from functools import cached_property
from pathlib import Path

from torch import nn

from echo_vectors import meta
from fishrt.bundle.folder import Bundle
from fishrt_engines import Engine, open_engine
from fishrt_export import Options, export_bundle
from fishrt_export.graph.job import GraphJob
from fishrt_export.models.codec.latent_dac import LatentDac
from fishrt_export.sources.codec import CodecSource
from fishrt_export.sources.echo import EchoSource, open_echo
from shared import make_once, trace_together


class EchoModel:
    """All processes of a session share `folder`."""

    def __init__(self, golden: Path, folder: Path) -> None:
        self.golden, self.folder = golden, folder
        self._engines: dict[str, Engine] = {}

    @cached_property
    def checkpoint(self) -> Path:
        """A copy of both repositories, with a config of the codec that states its attention windows."""

        def copy(folder: Path) -> None:
            shutil.copytree(self.golden / "checkpoint", folder)
            state_windows(folder)

        return make_once(self.folder / "checkpoint", copy)

    @cached_property
    def sources(self) -> tuple[EchoSource, CodecSource]:
        return open_echo(self.checkpoint)

    @cached_property
    def bundle(self) -> Bundle:
        options, path = Options(targets=("cuda", "coreml", "tensorrt")), self.folder / "bundle"
        if not path.exists():
            trace_together(list(self.jobs.values()))
        return Bundle.load(make_once(path, lambda folder: export_bundle(self.checkpoint, folder, options)))

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        return self.sources[0].modules()

    @cached_property
    def codec(self) -> LatentDac:
        module = self.sources[1].module()
        assert isinstance(module, LatentDac)
        return module

    @cached_property
    def jobs(self) -> dict[str, GraphJob]:
        model, codec = self.sources
        return {job.role: job for job in (*model.jobs(), *codec.jobs())}

    def engine(self, role: str) -> Engine:
        """Return an engine of the exported graph on the CPU."""
        if role not in self._engines:
            spec = self.bundle.manifest.specs[role]
            self._engines[role] = open_engine(self.bundle.file(spec.file), spec, provider="cpu")
        return self._engines[role]


def state_windows(folder: Path) -> None:
    """Write the config of the golden codec, which is in `folder` with its model."""
    sizes = meta()["ae_config"]
    windows = {"window_size": sizes["q_window"], "encoder_window_size": sizes["enc_window"]}
    (weights,) = (path for path in folder.rglob("*.safetensors") if path.parent.name.startswith("fish"))
    weights.with_name("codec_config.json").write_text(json.dumps(windows), encoding="utf-8")
