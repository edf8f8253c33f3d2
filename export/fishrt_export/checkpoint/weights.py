"""Tensors under the names of fishrt's modules, all checked before the export begins."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import ExportError, listed
from .files import LANGUAGE_MODEL_PARTS
from .lazy import Lazy, Maker, makers
from .threads import one_thread

log = logging.getLogger(__name__)

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_PIECE = 1 << 18
_LISTED = 20
_UNUSED = ("freqs_cis", "fast_freqs_cis", "causal_mask", "score_output", "audio_encoder", "audio_projector")
M = TypeVar("M", bound=nn.Module)


def flat_names(tensors: Mapping[str, Tensor], *, tied_head: bool) -> Mapping[str, Tensor]:
    """Return the tensors under flat names, for the nested form of S2-Pro too, with separate wq, wk and wv joined.

    As in the originals, tensors of no part of the model are left out: computed tables, the head of reward models and the audio
    input silently, others with a warning. A head that is tied to the embedding is left out too. Raises ExportError for a LoRA.
    """
    if all(".lora_" in name for name in tensors):
        raise ExportError(
            "the weights are those of a LoRA, not of a whole model",
            hint="put the model that it was trained on into the folder, and give the LoRA with --lora",
        )
    parts = {name: name.partition(".")[0] for name in tensors}
    if strange := [name for name, part in parts.items() if part not in (*LANGUAGE_MODEL_PARTS, *_UNUSED)]:
        log.warning("the weights hold tensors that belong to no part of the model and are left out: %s", listed(strange))
    flat = {name: make for name, make in makers(tensors).items() if parts[name] in LANGUAGE_MODEL_PARTS}
    if any(part in ("text_model", "audio_decoder") for part in parts.values()):
        flat = {_flat_name(name): make for name, make in flat.items()}
    if tied_head and (head := flat.pop("output.weight", None)):
        embeddings = flat.get("embeddings.weight")
        if embeddings is None or not torch.equal(head(), embeddings()):
            log.warning("config.json ties the output head to the token embedding: the head among the weights is left out")
    return Lazy(_join_legacy_projections(flat))


def _flat_name(name: str) -> str:
    if name == "text_model.lm_head.weight":
        return "output.weight"
    if name.startswith("text_model.model."):
        return name.removeprefix("text_model.model.")
    if name == "audio_decoder.codebook_embeddings.weight":
        return "codebook_embeddings.weight"
    if name.startswith("audio_decoder."):
        return "fast_" + name.removeprefix("audio_decoder.")
    return name


def _join_legacy_projections(tensors: dict[str, Maker]) -> dict[str, Maker]:
    prefixes = [match[1] for name in tensors if (match := re.fullmatch(r"(.*attention\.)wq\.weight", name))]
    for prefix in prefixes:
        parts = [f"{prefix}{part}.weight" for part in ("wq", "wk", "wv")]
        if all(part in tensors for part in parts):
            tensors[f"{prefix}wqkv.weight"] = _joining([tensors.pop(part) for part in parts])
    return tensors


def _joining(parts: Sequence[Maker]) -> Maker:
    return lambda: torch.cat([make() for make in parts])


def fuse_weight_norm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with weight norm fused, in either spelling: W = g · v / ‖v‖ over all axes except the first.

    W has the dtype of v.
    """
    fused: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for magnitude, direction in ((".parametrizations.weight.original0", ".parametrizations.weight.original1"), ("_g", "_v")):
            stem, pair = name.removesuffix(direction), name.removesuffix(direction) + magnitude
            if stem != name and pair in tensors:
                fused[stem if magnitude == "_g" else f"{stem}.weight"] = _scaled(tensors[pair], tensor)
                break
            if name.endswith(magnitude) and name.removesuffix(magnitude) + direction in tensors:
                break
        else:
            fused[name] = tensor
    return fused


def _scaled(magnitude: Tensor, direction: Tensor) -> Tensor:
    v = direction.double()
    norm = v.square().sum(dim=tuple(range(1, v.ndim)), keepdim=True).sqrt()
    return (magnitude.double() * v / norm).to(direction.dtype)


def expected_shapes(module: nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that a module takes from a checkpoint."""
    return {prefix + name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def find_problems(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]) -> list[str]:
    """Return all differences between the tensors of a checkpoint and the config, one line each."""
    problems = [f"missing: {name} {list(expected[name])}" for name in expected if name not in found]
    problems += [f"unexpected: {name} {list(found[name].shape)}" for name in found if name not in expected]
    for name in (name for name in found if name in expected):
        tensor = found[name]
        if tuple(tensor.shape) != expected[name]:
            problems.append(f"wrong shape: {name} is {list(tensor.shape)}, expected {list(expected[name])}")
        elif tensor.dtype not in FLOATS:
            problems.append(f"wrong type: {name} holds {tensor.dtype}; expected bfloat16, float16 or float32")
        elif not is_finite(tensor):
            problems.append(f"not finite: {name} holds NaN or infinity")
    return problems


def is_finite(tensor: Tensor) -> bool:
    """Return whether the tensor holds neither NaN nor infinity. It is checked in pieces that fit the processor's cache."""
    with one_thread():
        return all(bool(piece.isfinite().all()) for piece in torch.split(tensor.flatten(), _PIECE))


def raise_if_any(problems: Sequence[str]) -> None:
    """Raise one ExportError that lists all problems, if there are any."""
    if problems:
        raise ExportError(
            f"the weights do not fit the config ({len(problems)} problems):\n{listing(problems)}",
            hint="config and weights must be of one checkpoint, complete and undamaged",
        )


def listing(problems: Sequence[str]) -> str:
    """Return one line for each problem; of a long list, the first problems of each kind and the number of the others."""
    kinds = [problem.partition(":")[0] for problem in problems]
    most = max(_LISTED // max(len(set(kinds)), 1), 1)
    shown = [problem for i, problem in enumerate(problems) if len(problems) <= _LISTED or kinds[:i].count(kinds[i]) < most]
    left = len(problems) - len(shown)
    return "\n".join(f"  {line}" for line in (*shown, *([f"and {left} more"] if left else [])))


def on_meta(module: M) -> M:
    """Give a module that was made on the meta device weights without memory, enough for tracing.

    Each weight is one number of its own, expanded to its shape: the exporter would merge equal weights.
    """
    return load(module, {name: torch.tensor(float(n)).expand(t.shape) for n, (name, t) in enumerate(module.state_dict().items())})


def load(module: M, tensors: Mapping[str, Tensor]) -> M:
    """Give a module that was made on the meta device its weights, in float32. The names must match exactly."""
    module.load_state_dict({name: tensor.to(torch.float32) for name, tensor in tensors.items()}, assign=True)
    return module.requires_grad_(False).eval()
