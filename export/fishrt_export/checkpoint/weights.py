"""Tensors under the names of fishrt's modules, all checked before the export begins.

Tensors are read or computed when they are looked up, so that a checkpoint need not fit in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import ExportError, listed

log = logging.getLogger(__name__)

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
LANGUAGE_MODEL_PARTS = (
    *("embeddings", "codebook_embeddings", "layers", "norm", "output", "text_model", "audio_decoder"),
    *("fast_project_in", "fast_embeddings", "fast_layers", "fast_norm", "fast_output"),
)
"""The first parts of the names of a language model's tensors, in any form."""
_UNUSED = ("freqs_cis", "fast_freqs_cis", "causal_mask", "_buf", "score_output", "audio_encoder", "audio_projector")
"""Computed tables, the head of reward models, and the audio input, which was never released."""
_NESTED = {
    "text_model.lm_head.": "output.",
    "text_model.model.": "",
    "audio_decoder.codebook_embeddings.": "codebook_embeddings.",
    "audio_decoder.": "fast_",
}
"""Starts of the names of S2-Pro's files, and of the flat names."""
_PIECE = 1 << 18
_LISTED = 20
M = TypeVar("M", bound=nn.Module)
Maker = Callable[[], Tensor]


class Lazy(Mapping[str, Tensor]):
    """Named tensors, each made anew at every lookup. Nothing is cached, so look each up once and drop it after use."""

    def __init__(self, makers: Mapping[str, Maker]) -> None:
        self._makers = dict(makers)

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def makers(tensors: Mapping[str, Tensor]) -> dict[str, Maker]:
    """Return a function for each tensor that makes it. Renaming or dropping the functions reads no tensor."""
    if isinstance(tensors, Lazy):
        return dict(tensors._makers)
    return {name: partial(tensors.__getitem__, name) for name in tensors}


def flat_names(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the tensors under flat names, for the nested form of S2-Pro too.

    As in the originals, tensors of no part of the model are left out, with a warning if they are unknown. Raises ExportError for
    a LoRA.
    """
    if all(".lora_" in name for name in tensors):
        raise ExportError(
            "the weights are those of a LoRA, not of a whole model",
            hint="put the model that it was trained on into the folder, and give the LoRA with --lora",
        )
    parts = {name: name.partition(".")[0] for name in tensors}
    if strange := [name for name, part in parts.items() if part not in (*LANGUAGE_MODEL_PARTS, *_UNUSED)]:
        log.warning("the weights hold tensors that belong to no part of the model and are left out: %s", listed(strange))
    return Lazy({_flat_name(name): make for name, make in makers(tensors).items() if parts[name] in LANGUAGE_MODEL_PARTS})


def _flat_name(name: str) -> str:
    return next((flat + name.removeprefix(start) for start, flat in _NESTED.items() if name.startswith(start)), name)


def fuse_weight_norm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with weight norm fused, in either spelling: W = g · v / ‖v‖ over all axes except the first.

    W has the dtype of v.
    """
    fused = dict(tensors)
    for magnitude, direction in ((".weight_g", ".weight_v"), tuple(f".parametrizations.weight.original{i}" for i in (0, 1))):
        for stem in [name.removesuffix(magnitude) for name in tensors if name.endswith(magnitude)]:
            if stem + direction in fused:
                v, g = fused.pop(stem + direction), fused.pop(stem + magnitude)
                norm = v.double().square().sum(dim=tuple(range(1, v.ndim)), keepdim=True).sqrt()
                fused[f"{stem}.weight"] = (g.double() * v.double() / norm).to(v.dtype)
    return fused


def expected_shapes(module: nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that a module takes from a checkpoint."""
    return {prefix + name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def find_problems(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]) -> list[str]:
    """Return all differences between the tensors of a checkpoint and the expected ones, one line each."""
    problems = [f"missing: {name} {list(expected[name])}" for name in expected if name not in found]
    for name, tensor in found.items():
        if name not in expected:
            problems.append(f"unexpected: {name} {list(tensor.shape)}")
        elif tuple(tensor.shape) != expected[name]:
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


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread within the block, for work on many small tensors.

    Several threads wait for each other after every tensor. On a busy machine that makes them many times slower than one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def raise_if_any(
    problems: Sequence[str],
    what: str = "the weights do not fit the config",
    hint: str = "config and weights must be of one checkpoint, complete and undamaged",
) -> None:
    """Raise one ExportError that lists all problems, if there are any; of a long list, the first problems of each kind."""
    if not problems:
        return
    kinds = [problem.partition(":")[0] for problem in problems]
    most = max(_LISTED // len(set(kinds)), 1)
    result = [problem for i, problem in enumerate(problems) if len(problems) <= _LISTED or kinds[:i].count(kinds[i]) < most]
    left = [f"and {len(problems) - len(result)} more"] if len(result) < len(problems) else []
    raise ExportError(f"{what} ({len(problems)} problems):\n" + "\n".join(f"  {line}" for line in (*result, *left)), hint=hint)


def on_meta(module: M) -> M:
    """Give a module that was made on the meta device weights without memory, enough for tracing.

    Each weight is one number of its own, expanded to its shape: the exporter would merge equal weights.
    """
    return load(module, {name: torch.tensor(float(n)).expand(t.shape) for n, (name, t) in enumerate(module.state_dict().items())})


def load(module: M, tensors: Mapping[str, Tensor]) -> M:
    """Give a module that was made on the meta device its weights, in float32. The names must match exactly."""
    module.load_state_dict({name: tensor.to(torch.float32) for name, tensor in tensors.items()}, assign=True)
    return module.requires_grad_(False).eval()
