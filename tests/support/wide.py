"""The graphs of a random language model whose heads are wide enough for the fast operators."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fishrt_engines import Array, Engine, GraphSpec, State
from fishrt_export.sources.language_model import open_language_model
from synthetic import EVERYTHING, PLAIN, random_weights, write_flat

PLAIN_WIDE = {**PLAIN, "head_dim": 16, "fast_head_dim": 32}
EVERYTHING_WIDE = {**EVERYTHING, "head_dim": 32, "fast_head_dim": 16}


class Exported:
    """The slow AR and the fast AR of a random model."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        write_flat(folder, config, random_weights(config))
        self.source = open_language_model(folder, family="s2")
        self.folder, self.jobs = folder, {job.role: job for job in self.source.jobs("audio")}
        for job in self.jobs.values():
            job.run(folder)

    def file(self, role: str) -> Path:
        return self.folder / self.spec(role).file

    def spec(self, role: str) -> GraphSpec:
        """Return the spec of a portable graph; the frame graph is written when it is first asked for."""
        if role == "frame" and role not in self.jobs:
            self.jobs[role] = self.source.frame_job(self.source.describe("audio"), {})
            self.jobs[role].run(self.folder)
        return self.jobs[role].spec


def called(engine: Engine, feeds: Mapping[str, Array], state: State) -> dict[str, Array]:
    return {name: value.copy() for name, value in engine.run(feeds, state).items()}
