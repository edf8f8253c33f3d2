"""A checkpoint of the diffusion model: its files, its checks, the jobs of its graphs, and its codec with the PCA folded in."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fishrt.bundle.diffusion import DenoisingDefaults, Diffusion
from fishrt.bundle.features import Reads
from fishrt_engines.engine import GraphSpec

from ..checkpoint.diffusion.files import PARTS, PCA_NAMES, DiffusionFiles, find_diffusion, read_windows
from ..checkpoint.files import read_tensors, unwrap
from ..checkpoint.forms.folder import CodecFiles
from ..checkpoint.forms.recognise import recognise
from ..checkpoint.forms.table import read_table
from ..checkpoint.weights import Lazy, expected_shapes, find_problems, fuse_weight_norm, load, makers, on_meta
from ..errors import ExportError
from ..graph.job import GraphJob
from ..graph.trace import Dims
from ..models.codec.dac_shapes import infer_dac_config
from ..models.codec.latent_dac import pca_weights
from ..models.codec.load import fingerprint, read_stored_codec
from ..models.echo.conditions import LatentCondition, TextCondition, latent_spec, text_spec
from ..models.echo.config import EchoConfig, infer_config
from ..models.echo.denoiser import Denoiser, Schedule, denoise_spec, schedule_spec
from .codec import CodecSource
from .echo_cases import diffusion_cases

log = logging.getLogger(__name__)

TOLERANCE = 5e-4
VOICE_SECONDS = (10.0, 297.0)
BYTES = 256
_ROTARY_TABLES = ".freqs_cis"


@dataclass(frozen=True, slots=True)
class _Part:
    """One graph of the model."""

    role: str
    module: Callable[[], nn.Module]
    spec: GraphSpec
    original: Callable[[str], str | None]
    """Returns the checkpoint's name of a tensor of the module; None for a norm that has no weight there: its weight is ones."""
    dims: Dims


@dataclass(frozen=True, slots=True)
class EchoSource:
    """The diffusion model, with weights by the checkpoint's names."""

    config: EchoConfig
    weights: Mapping[str, Tensor]
    """They are read when they are looked up."""

    def problems(self) -> list[str]:
        """Return all differences between the weights and the sizes that some of them state."""
        return find_problems(self.shapes(), self.weights)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of the checkpoint."""
        return {
            name: shape
            for part in self._parts()
            for own, shape in expected_shapes(_empty(part)).items()
            if (name := part.original(own)) is not None
        }

    def describe(self) -> Diffusion:
        """Return the manifest's entry."""
        config = self.config
        return Diffusion(
            kind="diffusion",
            channels=config.channels,
            patch=config.patch,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            head_dim=config.head_dim,
            blockwise=config.latent is not None,
            max_frames=640 // config.patch * config.patch,
            max_tokens=768,
            max_voice_frames=6400 // config.patch * config.patch,
            voice_part_frames=640,
            denoising=DenoisingDefaults(),
            voice_seconds=VOICE_SECONDS,
            reads=Reads(languages=(), characters=None, tags=("[]", "()")),
        )

    def jobs(self) -> list[GraphJob]:
        """Return the jobs of all graphs but the codec's."""
        return [
            GraphJob(
                role=part.role,
                spec=part.spec,
                build=partial(_on_meta, part),
                weights=self._weights_of(part),
                cases=diffusion_cases(part.role, part.spec, self.config.patch),
                tolerance=TOLERANCE,
                dims=part.dims,
            )
            for part in self._parts()
        ]

    def modules(self) -> dict[str, nn.Module]:
        """Return the modules with their weights, in float32, by role."""
        return {part.role: load(_empty(part), self._weights_of(part)) for part in self._parts()}

    def _weights_of(self, part: _Part) -> Lazy:
        """Return the tensors under the names of a part's module."""
        found, made = makers(self.weights), {}
        for name, shape in expected_shapes(_empty(part)).items():
            original = part.original(name)
            made[name] = partial(torch.ones, shape) if original is None else found[original]
        return Lazy(made)

    def _parts(self) -> Iterator[_Part]:
        config, patches = self.config, {"frames": (self.config.patch, "patches")}
        voices = partial(LatentCondition, config, config.speaker, positions=False)
        yield _Part("text_cond", partial(TextCondition, config), text_spec(config), partial(_of_condition, "text"), {})
        yield _Part("speaker_cond", voices, latent_spec(config, "speaker"), partial(_of_condition, "speaker"), patches)
        if config.latent is not None:
            prefixes = partial(LatentCondition, config, config.latent, positions=True)
            yield _Part("latent_cond", prefixes, latent_spec(config, "latent"), partial(_of_condition, "latent"), patches)
        yield _Part("schedule", partial(Schedule, config), schedule_spec(config), _of_blocks, {})
        yield _Part("denoise", partial(Denoiser, config), denoise_spec(config), _of_blocks, {})


def open_echo(folder: Path, codec: Path | None = None) -> tuple[EchoSource, CodecSource]:
    """Read a checkpoint and its codec. codec: the folder of the codec; None: see find_diffusion.

    Raises ExportError for files that are missing, damaged or of another model. `problems` of both return the other faults.
    """
    files = find_diffusion(folder, codec)
    _check_form(files.weights)
    tensors = _renamed(unwrap(read_tensors(files.weights), PARTS, files.weights))
    config = infer_config(tensors)
    if config.vocabulary < BYTES:
        raise ExportError(f"{files.weights} has {config.vocabulary} embeddings of tokens; the tokens are the {BYTES} bytes")
    if config.latent is None:
        log.warning("the checkpoint has no tensors for generation in blocks: the bundle speaks whole utterances only")
    return EchoSource(config, tensors), _open_codec(files, config.channels)


def _check_form(path: Path) -> None:
    """Raise ExportError for quantised weights."""
    form = recognise(read_table(path))
    if form.name != "plain":
        form = replace(form, refused="quantised diffusion models are not read", instead="export the model that it was made from")
    form.check(path)


def _open_codec(files: DiffusionFiles, channels: int) -> CodecSource:
    found = CodecFiles(files.codec, None)
    tables = {name: table for name, table in read_tensors(files.codec).items() if name.endswith(_ROTARY_TABLES)}
    head_dims = {name.removesuffix(_ROTARY_TABLES): 2 * table.shape[1] for name, table in tables.items() if table.ndim == 3}
    fused = fuse_weight_norm(read_stored_codec(found))
    config = infer_dac_config(fused, head_dims, **read_windows(files.codec_config))
    weights = {**fused, **_pca(files.pca, channels, config.latent_dim)}
    return CodecSource(config, weights, fingerprint(weights, config), channels)


def _pca(path: Path, channels: int, dim: int) -> dict[str, Tensor]:
    """Return the projections of a PCA between latents of `channels` and the codec's sums of `dim`. Raises ExportError."""
    tensors = read_tensors(path)
    hint = "model, PCA and codec must be those that belong together"
    if problems := find_problems(dict(zip(PCA_NAMES, ((channels, dim), (dim,), (1,)), strict=True)), tensors):
        width = f"the model has {channels} channels and the codec {dim}"
        raise ExportError(f"{path} is not the PCA of this model and codec, {width}: {'; '.join(problems)}", hint=hint)
    components, mean, scale = (tensors[name] for name in PCA_NAMES)
    if not float(scale) > 0:
        raise ExportError(f"{path} has a latent_scale of {float(scale):g}; it must be above 0", hint=hint)
    return pca_weights(components, mean, scale)


def _renamed(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the tensors by the original's names, also those of mlx-audio's files."""
    found = makers(tensors)
    return Lazy({re.sub(r"^cond_module\.layers\.", "cond_module.", name): make for name, make in found.items()})


def _of_condition(of: str, name: str) -> str:
    """Return the original's name of a tensor of a Condition. of: "text", "speaker" or "latent"."""
    for pattern, original in (
        (r"^encoder\.", f"{of}_encoder."),
        (r"^norm\.", f"{of}_norm."),
        (r"^layers\.(\d+)\.k_norm\.", r"blocks.\1.attention.k_norm."),
        (r"^layers\.(\d+)\.(wk|wv)\.", rf"blocks.\1.attention.\2_{of}."),
    ):
        name = re.sub(pattern, original, name)
    return name


def _of_blocks(name: str) -> str | None:
    """Return the original's name of a tensor of Schedule or Denoiser."""
    weightless = name.startswith("layers.") and name.endswith(("attention_norm.weight", "mlp_norm.weight"))
    return None if weightless else re.sub(r"^layers\.", "blocks.", name)


def _empty(part: _Part) -> nn.Module:
    with torch.device("meta"):
        return part.module()


def _on_meta(part: _Part) -> nn.Module:
    return on_meta(_empty(part))
