"""The plan of an export: the manifest without what only the written files tell, and a job for each graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from fishrt.bundle.diffusion import Diffusion
from fishrt.bundle.features import LanguageModel
from fishrt.bundle.manifest import SCHEMA, Graph, Licence, Manifest
from fishrt.bundle.memory import check_memory
from fishrt.errors import BundleError
from fishrt.version import __version__

from ..checkpoint.families import Release
from ..checkpoint.names import DEFAULTS, TOKENIZER, checkpoint_name
from ..checkpoint.references import References
from ..errors import ExportError
from ..graph.job import GraphJob
from ..graph.recipe import Recipe, main_precision
from ..models.codec.latent_dac import PCA
from ..options import Options
from ..sources.codec import CodecSource

BASE_MEMORY = 300_000_000
"""Bytes that tracing and ONNX Runtime take for any model."""


@dataclass(slots=True)
class Plan:
    """What an export writes."""

    manifest: Manifest
    """Without what only the written files tell."""
    jobs: list[GraphJob]
    """The portable graphs. A job holds its weights, so it is taken out when it begins."""
    release: Release
    tokenizer: bytes | None = None
    """The content of TOKENIZER."""
    frame: GraphJob | None = None
    """The frame graph, which is written with the forms of the fast AR."""
    references: References | None = None

    def check_memory(self, checkpoint: Path) -> None:
        """Check that there is enough for the largest job. Raises FishrtError."""
        needs = [job.need() for job in (*self.jobs, *filter(None, [self.frame]))]
        check_memory(BASE_MEMORY + max(needs), f"exporting {checkpoint}")


def with_storage(options: Options, codec: CodecSource, model: list[GraphJob]) -> list[GraphJob]:
    """Return the jobs of a codec and those of a model, all with the storage of their weights. Raises ExportError.

    A PCA stays in float32, whatever the precision.
    """
    recipe = Recipe(options.precision, options.keep)
    of_codec = {name: kept for name, kept in recipe.codec_plan(codec.weights).items() if not name.startswith(PCA)}
    plans = recipe.plan({job.role: job.build() for job in model}, {job.role: job.weights for job in model})
    return [*(replace(job, plan=of_codec) for job in codec.jobs()), *(replace(job, plan=plans[job.role]) for job in model)]


def draft(
    checkpoint: Path,
    release: Release,
    model: LanguageModel | Diffusion,
    codec: CodecSource,
    jobs: list[GraphJob],
    options: Options,
) -> Manifest:
    """Return the manifest, checked, without what only the written files tell. Raises ExportError."""
    made = Manifest(
        schema=SCHEMA,
        name=checkpoint_name(checkpoint),
        exported_by=f"fishrt {__version__}",
        family=release.title,
        recipe=options.words,
        model=model,
        codec=codec.describe(),
        tokenizer=TOKENIZER if isinstance(model, LanguageModel) else None,
        graphs={job.role: Graph(job.spec, main_precision(job.plan, sizes(job.build())), memory=0) for job in jobs},
        quantisation=None,
        licence=Licence("", None),
        voices=None,
        files={},
    )
    try:
        made.check()
    except BundleError as error:
        hint = f"take all files from one checkpoint, and mend its {DEFAULTS} if it has one"
        raise ExportError(f"{checkpoint} cannot become a bundle: {error}", hint=hint) from None
    return made


def sizes(module: nn.Module) -> dict[str, int]:
    """Return the number of elements of each weight."""
    return {name: tensor.numel() for name, tensor in module.state_dict().items()}
