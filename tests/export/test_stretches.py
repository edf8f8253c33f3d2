"""Exports of models larger than memory: verified stretch by stretch, with tensors read one at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from fishrt_export.checkpoint.files import read_weights
from fishrt_export.errors import ExportError
from fishrt_export.graph.job import GraphJob
from fishrt_export.graph.stretches import BUDGET, FUSED_NORM, split, verify_stack
from fishrt_export.graph.verify import Held
from fishrt_export.models.stack import Stack
from fishrt_export.sources.language_model import open_language_model
from fishrt_export.targets.forms import make_forms
from synthetic import EVERYTHING, PLAIN, random_weights, write_nested

DEEP = {**EVERYTHING, "n_layer": 3, "n_fast_layer": 2}


def jobs_of(folder: Path, config: dict[str, object], head: str = "audio") -> list[GraphJob]:
    source = open_language_model(write_nested(folder, config, random_weights(config), shards=2))
    assert source.problems() == []
    return source.jobs(head)


def stack(job: GraphJob) -> Stack:
    module = job.build()
    assert isinstance(module, Stack)
    return module


def test_stretches_keep_to_the_budget(tmp_path: Path) -> None:
    job = jobs_of(tmp_path, DEEP)[0]
    assert split(stack(job), BUDGET) == [range(4)]
    assert split(stack(job), 1) == [range(part, part + 1) for part in range(4)]
    block = sum(4 * tensor.numel() for name, tensor in job.weights.items() if name.startswith("layers.1."))
    pairs = split(stack(job), 2 * block)
    assert pairs[0].start == 0
    assert pairs[-1].stop == 4
    assert max(len(parts) for parts in pairs) == 2


@pytest.mark.slow
@pytest.mark.parametrize("head", ["audio", "full"])
@pytest.mark.parametrize("tied", [True, False])
def test_stretches_are_the_whole(tmp_path: Path, tied: bool, head: str) -> None:
    """Every output of the last stretch and all caches are compared, so that equal errors show equal work."""
    for job in jobs_of(tmp_path / "checkpoint", {**DEEP, "tie_word_embeddings": tied}, head):
        folder = tmp_path / job.role
        folder.mkdir()
        whole = job.run(folder).parity
        held = Held(folder / job.spec.file, job.weights, job.plan)
        seen: list[float] = []
        (parts,) = verify_stack(
            lambda job=job: stack(job), [job.spec], folder, held, job.cases, job.tolerance, budget=1, progress=seen.append
        )
        assert parts.max_abs_error <= max(2 * whole.max_abs_error, 1e-5)
        assert seen == sorted(seen)
        assert len(seen) == len(stack(job).layers) + 1
        assert {path.name for path in folder.iterdir()} == {job.spec.file, f"{job.spec.file}.data"}


@pytest.mark.slow
def test_a_form_is_verified_as_it_is_and_in_stretches(tmp_path: Path) -> None:
    """Norms stay fused, except the one at which a stretch begins. A fused norm that adds something else is seen in both."""
    job = jobs_of(tmp_path / "checkpoint", {**DEEP, "head_dim": 16})[0]
    job.run(tmp_path)
    (form,) = make_forms(tmp_path, "slow_ar", job.spec, ["cpu"])
    held = Held(tmp_path / job.spec.file, job.weights, job.plan)

    def verified(budget: int) -> float:
        specs = [job.spec, form.spec]
        _, parity = verify_stack(lambda: stack(job), specs, tmp_path, held, job.cases, job.tolerance, budget=budget)
        return parity.max_abs_error

    whole, parts = verified(BUDGET), verified(1)
    assert 0 < parts <= max(2 * whole, 1e-5)
    model = ir.load(tmp_path / form.spec.file)
    fused = [node for node in model.graph if node.op_type == FUSED_NORM]
    assert len(fused) == 2 * DEEP["n_layer"] - 1
    fused[3].replace_input_with(1, fused[3].inputs[0])
    ir.save(model, tmp_path / form.spec.file)
    for budget in (BUDGET, 1):
        with pytest.raises(ExportError, match=r"slow_ar_cpu\.onnx is not the torch module"):
            verified(budget)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layers.2.feed_forward.w2.weight", "norm.weight", "codebook_embeddings.weight"])
def test_a_weight_that_is_another_is_seen(tmp_path: Path, name: str) -> None:
    job = jobs_of(tmp_path / "checkpoint", DEEP)[0]
    job.run(tmp_path)
    weights = {key: tensor.float() * (1.1 if key == name else 1) for key, tensor in job.weights.items()}
    with pytest.raises(ExportError, match=r"slow_ar\.onnx is not the torch module"):
        verify_stack(lambda: stack(job), [job.spec], tmp_path, weights, job.cases, job.tolerance, budget=1)
    assert not list(tmp_path.glob("*.stretch.onnx"))


@pytest.mark.slow
def test_the_graph_of_a_module_without_weights_is_that_of_the_real_one(tmp_path: Path) -> None:
    config = {**EVERYTHING, "n_layer": 1, "n_fast_layer": 1, "fast_dim": 16}
    source = open_language_model(write_nested(tmp_path / "checkpoint", config, random_weights(config)))
    for job, real in zip(source.jobs("audio"), (source.slow_ar("audio"), source.fast_ar()), strict=True):
        graphs = []
        for name, build in (("meta", job.build), ("real", lambda real=real: real)):
            (tmp_path / name).mkdir(exist_ok=True)
            replace(job, build=build).run(tmp_path / name)
            graphs.append((tmp_path / name / job.spec.file).read_bytes())
        assert graphs[0] == graphs[1]
        assert onnx.load_model_from_string(graphs[0]).graph.name == "main_graph"


# ---- tensors one at a time


def test_tensors_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    weights = random_weights(PLAIN)
    write_nested(tmp_path, PLAIN, weights, shards=3)
    index = tmp_path / "model.safetensors.index.json"
    found = read_weights(index)
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    shard.unlink()
    readable = [name for name in found if can_be_read(found, name)]
    assert 0 < len(readable) < len(weights)


def can_be_read(weights: object, name: str) -> bool:
    try:
        weights[name]  # type: ignore[index]
    except ExportError as error:
        assert "cannot be read" in str(error)  # noqa: PT017 (one of many names)
        return False
    return True


LAYERS, WIDTH = 8, 1792
MEASURE = """
import sys
from pathlib import Path
from fishrt_engines.machine import peak_memory
from fishrt_export.sources.language_model import open_language_model
from fishrt_export.graph.recipe import Recipe
from fishrt_export.graph.stretches import verify_stack
from dataclasses import replace
small, large, out = map(Path, sys.argv[1:])
for n, checkpoint in enumerate((small, large)):
    source = open_language_model(checkpoint)
    assert not source.problems()
    job = source.jobs("audio")[0]
    plan = Recipe("int4").plan({job.role: job.build()}, {job.role: job.weights})[job.role]
    verify_stack.__kwdefaults__["budget"] = 1
    folder = out / str(n)
    folder.mkdir()
    replace(job, plan=plan).run(folder)
    print(peak_memory())
"""


@pytest.mark.thorough
@pytest.mark.slow
def test_a_deep_model_takes_no_more_memory_than_a_shallow_one(tmp_path: Path) -> None:
    """The same widths with 2 and with 8 blocks, of 480 MB in float32, in one process: the peak hardly grows."""
    config = {
        **PLAIN,
        **{"dim": WIDTH, "n_head": 14, "n_local_heads": 2, "head_dim": 128, "intermediate_size": WIDTH, "fast_dim": 16},
        "attention_qk_norm": True,
        "tie_word_embeddings": True,
    }
    for name, layers in (("small", 2), ("large", LAYERS)):
        deep = {**config, "n_layer": layers}
        one = random_weights({**config, "n_layer": 1})
        weights = {key: tensor for key, tensor in one.items() if not key.startswith("layers.")}
        blocks = {key: 0.1 * tensor for key, tensor in one.items() if key.startswith("layers.0.")}
        weights |= {
            key.replace("layers.0.", f"layers.{i}."): block.clone() for key, block in blocks.items() for i in range(layers)
        }
        write_nested(tmp_path / name, deep, weights)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    (tmp_path / "out").mkdir()
    arguments = [tmp_path / "small", tmp_path / "large", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    small, large = map(int, done.stdout.split())
    block_bytes = 4 * sum(tensor.numel() for tensor in blocks.values())
    assert LAYERS * block_bytes > 450e6
    assert large - small < 0.25 * LAYERS * block_bytes
