"""The files of a diffusion model's checkpoint: the model, its PCA and the codec, in one folder or several. Loads no torch.

A file is recognised by the names of its tensors. The official ones are two repositories, whose folders may lie beside each other
or within each other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...errors import ExportError, listed
from ..content import read_json, reading
from ..forms.table import read_header
from ..names import CODEC_CONFIG, choose_checkpoint, tells_terms

WEIGHTS = "pytorch_model.safetensors"
PCA = "pca_state.safetensors"
CODEC_REPOSITORY = "jordand/fish-s1-dac-min"
PARTS = ("text_encoder", "speaker_encoder", "latent_encoder", "cond_module", "blocks", "in_proj", "out_proj", "out_norm")
"""The first parts of the names of a diffusion model's tensors, with those of no other model first."""
PCA_NAMES = ("pca_components", "pca_mean", "latent_scale")

_OWN_PARTS = {"text_encoder", "speaker_encoder", "cond_module"}
_CODEC_PARTS = {"encoder", "decoder", "quantizer"}
_NEEDS = "a checkpoint is the model and its PCA, and the codec, in one folder or in folders within it"


@dataclass(frozen=True, slots=True)
class DiffusionFiles:
    """The three files of a checkpoint."""

    weights: Path
    pca: Path
    codec: Path
    codec_config: Path | None
    """None: the codec has the official attention windows."""


def is_diffusion(folder: Path) -> bool:
    """Return whether a folder has a diffusion model, or a file with the name of its PCA."""
    for path in _candidates(folder):
        with suppress(ExportError):  # damaged: the file of either kind of model
            if path.name == PCA or _kind(path) == "model":
                return True
    return False


def find_diffusion(folder: Path, codec: Path | None = None) -> DiffusionFiles:
    """Find the files in a folder or the folders in it. codec: the folder of the codec; None: there, or beside `folder`.

    Raises ExportError for a file that is missing, damaged, or there twice.
    """
    found = _by_kind(_candidates(folder))
    beside = folder.absolute().parent / CODEC_REPOSITORY.partition("/")[2]
    if codec is not None:
        found["codec"] = _by_kind(_candidates(codec))["codec"]
        if not found["codec"]:
            raise ExportError(f"{codec} has no codec", hint=f"give the folder of {CODEC_REPOSITORY}, or its name on the Hub")
    elif not found["codec"] and beside.is_dir():
        found["codec"] = _by_kind(_candidates(beside))["codec"]
    hints = {"model": _NEEDS, "PCA": f"put {PCA} beside the model", "codec": f"give it: --codec {CODEC_REPOSITORY}"}
    for what, paths in found.items():
        if not paths:
            raise ExportError(f"{folder} has no {what}" + (f" ({PCA})" if what == "PCA" else ""), hint=hints[what])
        if len(paths) > 1:
            names = listed([str(path) for path in paths])
            raise ExportError(f"{folder} has {len(paths)} files of a {what}: {names}", hint="keep the one of this model")
    (weights,), (pca,), (file,) = found.values()
    config = file.with_name(CODEC_CONFIG)
    return DiffusionFiles(weights, pca, file, config if config.is_file() else None)


def choose_files(
    names: Sequence[str], read: Callable[[str], Path], *, weights: str | None = None, given: Collection[str] = ()
) -> list[str]:
    """Return the files of a model's repository, of either kind, that an export needs. Raises ExportError if one is not there.

    A diffusion model has a PCA. weights, given: see choose_checkpoint.
    """
    if PCA not in names:
        return choose_checkpoint(names, read, weights=weights, given=given)
    if WEIGHTS not in names:
        raise ExportError(f"the repository lacks {WEIGHTS}; it has {listed(names)}", hint=_NEEDS)
    return [*filter(tells_terms, names), WEIGHTS, PCA]


def choose_codec(names: Sequence[str], _read: Callable[[str], Path]) -> list[str]:
    """Return the files of the codec's repository that an export needs. Raises ExportError for a repository that lacks one."""
    if WEIGHTS not in names:
        raise ExportError(
            f"the repository has no codec: it lacks {WEIGHTS}; it has {listed(names) or 'no files'}",
            hint=f"the official one is {CODEC_REPOSITORY}",
        )
    return [name for name in names if name in (WEIGHTS, CODEC_CONFIG)]


def tensor_names(path: Path) -> Collection[str]:
    """Return the names of the tensors of a safetensors file, from its header. Raises ExportError."""
    return read_header(path).keys() - {"__metadata__"}


def read_windows(path: Path | None) -> dict[str, int]:
    """Return the attention windows of a codec's config by the arguments of infer_dac_config. Raises ExportError.

    Its fields are `window_size`, of the quantiser's transformers, and `encoder_window_size`. path: None has the official ones.
    """
    if path is None:
        return {}
    from ..config import Fields

    fields = {"window_size": "window", "encoder_window_size": "encoder_window"}
    read = Fields(read_json(path), str(path))
    read.only(fields)
    return {argument: read.count(name) for name, argument in fields.items() if name in read.values}


def _candidates(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder and of the folders in it."""
    with reading(folder):
        if not folder.is_dir():
            return []
        folders = [folder, *sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))]
        return [path for each in folders for path in sorted(each.glob("*.safetensors")) if path.is_file()]


def _by_kind(paths: Sequence[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {"model": [], "PCA": [], "codec": []}
    for path in paths:
        found.get(_kind(path), []).append(path)
    return found


def _kind(path: Path) -> str:
    """Return what a file holds: "model", "PCA", "codec" or something else."""
    names = tensor_names(path)
    if "pca_components" in names or path.name == PCA:
        return "PCA"
    parts = set(_first_parts(names))
    if parts & _OWN_PARTS:
        return "model"
    return "codec" if parts >= _CODEC_PARTS else ""


def _first_parts(names: Collection[str]) -> Iterator[str]:
    """Yield the first two parts of all names: the first may be a prefix."""
    for name in names:
        yield from name.split(".")[:2]
