"""The training loop of every stage: seeded by step, resumable, logged as JSON lines."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fishrt_engines.aside import new_file

Step = Callable[[int, torch.Generator], Mapping[str, Tensor]]


def train(
    name: str,
    folder: Path,
    modules: nn.Module,
    step: Step,
    *,
    steps: int,
    learning_rate: float,
    warmup: int = 200,
    decay: float = 1.0,
    weight_decay: float = 0.0,
    matrices: Sequence[nn.Parameter] = (),
    betas: tuple[float, float] = (0.9, 0.98),
    clip: float = 1.0,
    save_every_s: float = 120.0,
    log_every: int = 25,
    seed: int = 1,
) -> None:
    """Minimise `step(...)["loss"]` over the parameters of `modules`. Resumes from `folder/name.pt` if it exists.

    The learning rate is constant after `warmup` steps, and falls as a cosine over the last `decay` share of the steps. Muon
    trains `matrices`, and AdamW the other parameters. `step` receives the step number and a generator seeded from it, so that a
    resumed run has the same data as an unbroken one.
    """
    parameters = [p for p in modules.parameters() if p.requires_grad]
    chosen = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, betas=betas, weight_decay=weight_decay, fused=True)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    checkpoint = folder / f"{name}.pt"
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        modules.load_state_dict(state["modules"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        start = state["step"]
        print(f"{name}: continuing at step {start}", flush=True)
    saved = began = time.monotonic()
    sums: dict[str, float] = {}
    for n in range(start, steps):
        fallen = max(0.0, 1.0 - (1.0 - n / steps) / decay)
        rate = learning_rate * min(1.0, (n + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * fallen)))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        losses = step(n, torch.Generator().manual_seed(seed * 1_000_003 + n))
        modules.zero_grad(set_to_none=True)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(parameters, clip)
        for optimizer in optimizers:
            optimizer.step()
        for key, value in {**losses, "grad_norm": norm}.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
        if (n + 1) % log_every == 0:
            means = {key: round(value / log_every, 4) for key, value in sums.items()}
            line = json.dumps({"step": n + 1, **means, "rate": rate, "elapsed_s": round(time.monotonic() - began, 1)})
            with (folder / f"{name}.jsonl").open("a") as log:
                log.write(line + "\n")
            print(name, line, flush=True)
            sums = {}
        if time.monotonic() - saved > save_every_s or n + 1 == steps:
            save(checkpoint, {"modules": modules.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": n + 1})
            saved = time.monotonic()


def save(path: Path, state: object) -> None:
    """Save a state: an interrupted save never replaces a good file."""
    with new_file(path) as aside:
        torch.save(state, aside)
