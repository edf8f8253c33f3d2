"""The training loop that every stage shares: seeded by step, resumable, logged as JSON lines."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

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
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.98),
    clip: float = 1.0,
    save_every_s: float = 120.0,
    log_every: int = 25,
    seed: int = 1,
) -> None:
    """Minimises `step(...)["loss"]` over the parameters of `modules`; continues from `folder/name.pt` where it exists.

    `step` is given the step number and a generator seeded from it, so that a resumed run sees the data an unbroken one would.
    """
    parameters = [p for p in modules.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True)
    checkpoint = folder / f"{name}.pt"
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        print(f"{name}: continuing at step {start}", flush=True)
    saved = began = time.monotonic()
    sums: dict[str, float] = {}
    for n in range(start, steps):
        rate = learning_rate * min(1.0, (n + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * n / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses = step(n, torch.Generator().manual_seed(seed * 1_000_003 + n))
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(parameters, clip)
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
            save(checkpoint, {"modules": modules.state_dict(), "optimizer": optimizer.state_dict(), "step": n + 1})
            saved = time.monotonic()


def save(path: Path, state: object) -> None:
    """Writes aside and renames, so that an interrupted save never replaces a good file."""
    aside = path.with_suffix(".tmp")
    torch.save(state, aside)
    aside.replace(path)
