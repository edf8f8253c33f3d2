"""The diffusion model as graphs: sizes of all kinds, stretches, and what its checkpoint may lack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fishrt_export.graph.job import GraphJob
from fishrt_export.graph.stretches import split, verify_stack
from fishrt_export.graph.verify import Held
from fishrt_export.models.echo.config import EchoConfig, EncoderSizes, infer_config
from fishrt_export.models.stack import Stack
from fishrt_export.sources.echo import EchoSource
from full_size.echo import random_weights
from helpers_diffusion import diffusion_model, diffusion_specs

ODD = EchoConfig(
    channels=6,
    width=20,
    layers=5,
    heads=3,
    head_dim=8,
    hidden=28,
    embedding=10,
    rank=5,
    vocabulary=260,
    patch=2,
    text=EncoderSizes(layers=1, dim=18, heads=2, head_dim=4, hidden=14),
    speaker=EncoderSizes(layers=3, dim=16, heads=1, head_dim=10, hidden=12),
    latent=EncoderSizes(layers=2, dim=22, heads=5, head_dim=6, hidden=8),
)
"""No size fits another: heads are not the width, their number is odd, and no encoder is like another."""


def jobs_of(config: EchoConfig) -> dict[str, GraphJob]:
    source = EchoSource(config, random_weights(config))
    assert source.problems() == []
    return {job.role: job for job in source.jobs()}


@pytest.mark.parametrize("config", [ODD, replace(ODD, latent=None), replace(ODD, heads=1, patch=1, layers=1)])
def test_shapes_state_all_sizes(config: EchoConfig) -> None:
    assert infer_config(random_weights(config)) == config


@pytest.mark.parametrize("blockwise", [True, False])
def test_the_graphs_are_those_that_the_runtime_is_tested_with(blockwise: bool) -> None:
    config = ODD if blockwise else replace(ODD, latent=None)
    model = EchoSource(config, {}).describe()
    assert list(model.faults()) == []
    assert model.blockwise == blockwise
    fakes = diffusion_specs(diffusion_model(**{name: getattr(model, name) for name in diffusion_model().__slots__}))
    assert {job.role: job.spec for job in EchoSource(config, random_weights(config)).jobs()} == {
        role: spec for role, spec in fakes.items() if not role.startswith("codec")
    }


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("blockwise", [True, False])
def test_graphs_of_odd_sizes(tmp_path: Path, blockwise: bool) -> None:
    """Each is compared with its module by its job. Padding, rows, prefixes and batches are among the cases."""
    config = ODD if blockwise else replace(ODD, latent=None)
    jobs = jobs_of(config)
    assert ("latent_cond" in jobs) == blockwise
    for job in jobs.values():
        assert job.run(tmp_path).parity.max_abs_error <= 1e-4, job.role


@pytest.mark.thorough
@pytest.mark.slow
def test_stretches_are_the_whole(tmp_path: Path) -> None:
    job = jobs_of(ODD)["denoise"]
    whole = job.run(tmp_path).parity

    def build() -> Stack:
        module = job.build()
        assert isinstance(module, Stack)
        return module

    assert split(build(), 1) == [range(part, part + 1) for part in range(6)]
    seen: list[float] = []
    held = Held(tmp_path / job.spec.file, job.weights, job.plan)
    (parts,) = verify_stack(build, [job.spec], tmp_path, held, job.cases, job.tolerance, budget=1, progress=seen.append)
    assert parts.max_abs_error <= max(2 * whole.max_abs_error, 1e-5)
    assert len(seen) == 6
    assert {path.name for path in tmp_path.iterdir()} == {job.spec.file, f"{job.spec.file}.data"}


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda weights: weights.pop(name)


def put(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda weights: weights.update({name: tensor})


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (drop("latent_norm.weight"), "missing: latent_norm.weight [22]"),
        (drop("blocks.3.attention.wk_latent.weight"), "missing: blocks.3.attention.wk_latent.weight [24, 22]"),
        (drop("text_norm.weight"), "missing: text_norm.weight [18]"),
        (drop("blocks.4.mlp_adaln.gate_up.bias"), "missing: blocks.4.mlp_adaln.gate_up.bias [20]"),
        (put("blocks.0.attention.bias", torch.zeros(2)), "unexpected: blocks.0.attention.bias [2]"),
        (put("out_proj.bias", torch.zeros(7)), "wrong shape: out_proj.bias is [7], expected [6]"),
        (put("out_norm.weight", torch.full((20,), torch.nan)), "not finite: out_norm.weight holds NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit(edit: Callable[[dict[str, torch.Tensor]], object], problem: str) -> None:
    weights = random_weights(ODD)
    edit(weights)
    assert EchoSource(infer_config(weights), weights).problems() == [problem]
