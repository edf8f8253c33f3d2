"""Quantised weights of linear layers: error, layout, and the choice for each layer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from fishrt.bundle.quantisation import ROWS, LayerReport, Quantisation
from fishrt.cli import main
from fishrt_engines import open_engine
from fishrt_engines.engine import GraphSpec, TensorSpec
from fishrt_export import Options, export_bundle
from fishrt_export.errors import ExportError
from fishrt_export.graph.quantise import BITS, block_size, dequantise, pack, quantise, quantise_columns, relative_error, unpack
from fishrt_export.graph.recipe import Recipe, Storage, main_precision
from fishrt_export.graph.store import SCALES, store, stored_float
from fishrt_export.graph.trace import trace
from fishrt_export.graph.verify import Held
from fishrt_export.sources.language_model import open_language_model
from synthetic import PLAIN, random_weights, write_nested

WIDE = {
    **PLAIN,
    **{"dim": 64, "n_head": 4, "n_local_heads": 2, "head_dim": 16, "intermediate_size": 160},
    **{"fast_dim": 32, "fast_n_head": 2, "fast_n_local_heads": 1, "fast_head_dim": 12, "fast_intermediate_size": 48},
}
"""Sizes with blocks of 64, 32 and 16, and one layer that no block divides: the fast AR's wo, of 24 inputs."""


@pytest.mark.parametrize(("inputs", "block"), [(2560, 128), (192, 64), (96, 32), (48, 16), (24, None), (128 * 3, 128)])
def test_the_largest_block_that_divides(inputs: int, block: int | None) -> None:
    assert block_size(inputs) == block


@pytest.mark.parametrize("block", [16, 128])
def test_error_bounds(block: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(70, 256) * torch.logspace(-3, 3, 70)[:, None]
    eight, scales = quantise(weight, 8, block)
    assert (eight.shape, scales.shape) == ((256, 70), (256 // block, 70))
    step = weight.reshape(70, -1, block).abs().amax(2) / 127
    assert ((dequantise(eight, scales) - weight).abs() <= 0.501 * step.repeat_interleave(block, 1)).all()
    four, scales = quantise(weight, 4, block)
    assert four.min() >= -8
    assert four.max() <= 7
    # The search does no worse than the whole range, block by block.
    whole = weight.reshape(70, -1, block).abs().amax(2, keepdim=True) / 7
    plain = ((weight.reshape(70, -1, block) / whole).round() * whole).flatten(1)
    ours, theirs = ((value - weight).square().reshape(70, -1, block).sum(2) for value in (dequantise(four, scales), plain))
    assert (ours <= theirs * 1.0001).all()
    assert relative_error(dequantise(four, scales), weight) < (0.11 if block == 128 else 0.085)


def test_columns_have_one_scale_and_neighbours_that_fit_16_bits() -> None:
    torch.manual_seed(0)
    weight = torch.randn(70, 256) * torch.logspace(-3, 3, 70)[:, None]
    weight[0], weight[1] = weight[0].abs() + 3, 0  # neighbours of one sign, of which each may be the largest; nothing at all
    integers, scales = quantise_columns(weight, 128)
    assert torch.equal(scales[0], scales[1])
    pairs = integers.int().T.unflatten(1, (-1, 2))
    for one_sign in (pairs.clamp(min=0), pairs.clamp(max=0)):
        assert 255 * one_sign.sum(2).abs().max() <= 32767
    assert ((dequantise(integers, scales) - weight).abs() <= 0.501 * scales[0][:, None]).all()
    assert relative_error(dequantise(integers, scales)[2:], weight[2:]) < 0.012


def test_extreme_weights() -> None:
    """Zeros, a single value, one far above the others, and numbers next to the ends of float32."""
    weight = torch.zeros(5, 32)
    weight[1, 3], weight[2], weight[2, 0], weight[3], weight[4] = -7.0, 0.01, 100.0, 1e-38, 1e38
    for bits in BITS.values():
        integers, scales = quantise(weight, bits, 16)
        value = dequantise(integers, scales)
        assert value.isfinite().all()
        assert (scales > 0).all()
        assert not value[0].any()
        assert value[1, 3] == pytest.approx(-7.0)
        assert not value[3].any()
        assert torch.allclose(value[4], weight[4])


@pytest.mark.parametrize("shape", [(4, 6), (3, 5), (1, 1)])
def test_packing(shape: tuple[int, int]) -> None:
    integers = torch.randint(-8, 8, shape, dtype=torch.int8)
    assert torch.equal(unpack(pack(integers), shape), integers)
    assert len(pack(integers)) == -(-integers.numel() // 2)


class Layers(nn.Module):
    """Layers of all kinds: on a sequence, with a bias, and on vectors, which become a Gemm in the export."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(9, 32)
        self.wide, self.biased = nn.Linear(32, 49, bias=False), nn.Linear(49 - 1, 32)
        self.output, self.project = nn.Linear(32, 7, bias=False), nn.Linear(32, 5)

    def forward(self, codes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.biased(self.wide(self.embeddings(codes))[..., 1:])
        return self.output(x[:, -1]), self.project(x[:, -1]), x


SPEC = GraphSpec(
    "layers.onnx",
    (TensorSpec("codes", "int64", ("batch", "length")),),
    (
        TensorSpec("logits", "float32", ("batch", 7)),
        TensorSpec("hidden", "float32", ("batch", 5)),
        TensorSpec("x", "float32", ("batch", "length", 32)),
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8-rows", "int4"])
def test_a_graph_computes_with_what_the_file_holds(tmp_path: Path, precision: str) -> None:
    torch.manual_seed(0)
    module = Layers().requires_grad_(False)
    weights = dict(module.state_dict())
    plan = Recipe(precision).plan({"fast_ar": module}, {"fast_ar": weights})["fast_ar"]
    if precision == "int4":  # which this recipe has for other layers
        plan = {name: Storage("int4", storage.block) if storage.block else storage for name, storage in plan.items()}
    store(trace(module, SPEC, {}), tmp_path / SPEC.file, weights, plan)
    held = Held(tmp_path / SPEC.file, weights, plan)
    graph = onnx.load(tmp_path / SPEC.file, load_external_data=False)
    onnx.checker.check_model(tmp_path / SPEC.file)
    kinds = {tensor.name: tensor for tensor in graph.graph.initializer}
    if precision in BITS:
        assert list(kinds["wide.weight"].dims) == [32, 49]
        assert list(kinds["wide.weight" + SCALES].dims) == [1, 49]
        assert kinds["wide.weight"].data_type == (onnx.TensorProto.INT4 if precision == "int4" else onnx.TensorProto.INT8)
        assert kinds["embeddings.weight"].data_type == onnx.TensorProto.FLOAT16
    exact = {name: held[name] for name in weights}
    module.load_state_dict(exact)
    codes = np.array([[1, 2, 3], [8, 0, 5]])
    found = open_engine(tmp_path / SPEC.file, SPEC, provider="cpu").run({"codes": codes})
    for name, value in zip(("logits", "hidden", "x"), module(torch.from_numpy(codes)), strict=True):
        np.testing.assert_allclose(found[name], value.numpy(), atol=1e-5)
    assert held.errors.keys() == ({name for name, storage in plan.items() if storage.block} if precision in BITS else set())
    if precision in BITS:
        assert max(held.errors.values()) < (0.1 if precision == "int4" else 0.01)


@pytest.mark.slow
def test_a_file_that_holds_other_integers(tmp_path: Path) -> None:
    module = Layers().requires_grad_(False)
    weights = dict(module.state_dict())
    plan = {"wide.weight": Storage("int8", 32)}
    store(trace(module, SPEC, {}), tmp_path / SPEC.file, weights, plan)
    held = Held(tmp_path / SPEC.file, {**weights, "wide.weight": weights["wide.weight"].flip(1)}, plan)
    with pytest.raises(ExportError, match=r"layers\.onnx does not hold wide\.weight"):
        held["wide.weight"]


def test_numbers_beyond_float16_stay() -> None:
    for value, kind in ((65024.0, torch.float16), (70000.0, torch.bfloat16)):
        assert stored_float(torch.tensor([1.0, -value], dtype=torch.bfloat16), "fp16").dtype == kind


# ---- recipes


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nested(tmp_path_factory.mktemp("wide"), WIDE, random_weights(WIDE))


def planned(checkpoint: Path, recipe: Recipe, head: str = "audio") -> dict[str, str]:
    jobs = open_language_model(checkpoint).jobs(head)
    plans = recipe.plan({job.role: job.build() for job in jobs}, {job.role: job.weights for job in jobs})
    return {
        f"{role}.{name.removesuffix('.weight')}": storage.precision
        for role, plan in plans.items()
        for name, storage in plan.items()
    }


def test_the_usual_recipes(wide: Path) -> None:
    plan = planned(wide, Recipe("int4"))
    assert {plan[name] for name in plan if name.startswith("slow_ar.layers.")} == {"int4"}
    assert {plan[name] for name in plan if name.startswith("fast_ar.layers.") and not name.endswith("wo")} == {"int8"}
    assert plan["fast_ar.layers.0.attention.wo"] == "fp32"  # 24 inputs
    assert plan["slow_ar.output"] == plan["slow_ar.fast_project_in"] == plan["fast_ar.output"] == "int8"
    assert plan["slow_ar.embeddings"] == plan["fast_ar.embeddings"] == "fp32"  # in bfloat16, as the checkpoint has them
    rows = planned(wide, Recipe("int8-rows"))
    assert {rows[name] for name in ("slow_ar.layers.0.attention.wo", "fast_ar.layers.0.attention.wqkv", "slow_ar.output")} == {
        ROWS
    }
    assert set(planned(wide, Recipe("fp16")).values()) == {"fp16"}
    assert set(planned(wide, Recipe()).values()) == {"fp32"}
    assert "slow_ar.output" not in planned(wide, Recipe("int4"), "full")  # the head is the embedding


def test_float32_embeddings_become_float16(tmp_path: Path) -> None:
    checkpoint = write_nested(tmp_path, WIDE, random_weights(WIDE, dtype=torch.float32))
    assert planned(checkpoint, Recipe("int8"))["slow_ar.codebook_embeddings"] == "fp16"


def test_exceptions_by_name(wide: Path) -> None:
    keep = {"fast_ar.*": "int4", "*.output.weight": "fp32", "slow_ar.layers.0.*": "int8", "slow_ar.embeddings": "fp16"}
    plan = planned(wide, Recipe("int4", keep))
    assert plan["fast_ar.layers.0.attention.wqkv"] == "int4"
    assert plan["fast_ar.output"] == plan["slow_ar.output"] == "fp32"
    assert plan["fast_ar.embeddings"] == "fp32"
    assert plan["slow_ar.layers.0.feed_forward.w1"] == "int8"
    assert plan["slow_ar.layers.1.feed_forward.w1"] == "int4"
    assert plan["slow_ar.embeddings"] == "fp16"


@pytest.mark.parametrize("pattern", ["slow_ar.layers.9.*", "slow_ar.norm", "slow_ar.embeddings", "codec_decode.*", "output"])
def test_a_name_that_matches_nothing(wide: Path, pattern: str) -> None:
    with pytest.raises(ExportError, match="no layer that can be stored so matches") as caught:
        planned(wide, Recipe("fp32", {"slow_ar.*": "fp16", pattern: "int8"}))
    assert f"{pattern}=int8" in str(caught.value)


def test_the_precision_of_most_weights() -> None:
    plan = {"a": Storage("int4", 16), "b": Storage("int8", 16), "c": Storage("int8", 16)}
    assert main_precision(plan, {"a": 10, "b": 4, "c": 5}) == "int4"
    assert main_precision({}, {}) == "fp32"


def report(*layers: tuple[str, str, int | None, float, str]) -> Quantisation:
    return Quantisation(tuple(LayerReport(*layer) for layer in layers))


def test_the_report_judges() -> None:
    """It judges the error, lists layers left out with the reason, and gives advice."""
    usual = report(
        ("slow_ar.a", "int4", 32, 0.08, ""),
        ("slow_ar.b", "int4", 32, 0.12, ""),
        ("slow_ar.embeddings", "fp16", None, 0.0, "tables"),
        ("fast_ar.c", "int8", 16, 0.01, ""),
        ("fast_ar.d", "fp32", None, 0.0, ""),
    )
    assert usual.summary() == [
        "int4: 2 of 5 layers, error 10.0% on average, 12.0% at most (slow_ar.b), within the usual 13%",
        "int8: 1 of 5 layers, error 1.0% on average, 1.0% at most (fast_ar.c), within the usual 2%",
        "left in fp16: 1 of 5 layers, tables",
        "left in fp32: 1 of 5 layers",
    ]
    assert usual.precisions("slow_ar") == "int4 (2 layers), fp16 (1)"
    worse = [(f"slow_ar.{n}", "int4", 32, 0.2 + n / 100, "") for n in range(4)]
    lines = report(*worse, ("slow_ar.x", "int4", 32, 0.1, "")).summary()
    assert lines[1] == "  more than the usual 13%: slow_ar.3, slow_ar.2, slow_ar.1 and 1 more; --keep NAME=int8 helps"


# ---- bundles


@pytest.mark.slow
def test_a_quantised_bundle(checkpoint: Path, tmp_path: Path) -> None:
    for path in checkpoint.glob("model*"):
        path.unlink()
    codebooks = json.loads((checkpoint / "config.json").read_text())["audio_decoder_config"]["num_codebooks"]
    config = {**WIDE, "num_codebooks": codebooks}
    write_nested(checkpoint, config, random_weights(config))
    bundle = export_bundle(checkpoint, tmp_path / "out", Options(precision="int4", keep={"fast_ar.output": "int4"}))
    assert {role: graph.precision for role, graph in bundle.manifest.graphs.items()} == {
        "codec_encode": "fp32",
        "codec_decode": "fp32",
        "slow_ar": "int4",
        "fast_ar": "int8",
    }
    report = bundle.manifest.quantisation
    assert report is not None
    layers = {layer.name: layer for layer in report.layers}
    assert (layers["slow_ar.layers.1.feed_forward.w2"].precision, layers["slow_ar.layers.1.feed_forward.w2"].block) == (
        "int4",
        32,
    )
    assert 0.03 < layers["slow_ar.layers.1.feed_forward.w2"].error < 0.12
    assert layers["fast_ar.layers.0.attention.wo"] == type(layers["slow_ar.output"])(
        "fast_ar.layers.0.attention.wo", "fp32", None, 0.0, "whose width is no multiple of 16"
    )
    assert layers["fast_ar.output"].precision == "int4"
    assert any(line.startswith(f"int4: 11 of {len(layers)} layers, error ") for line in report.summary())
    assert any("layers, embedding tables" in line for line in report.summary())
    shown = CliRunner().invoke(main, ["inspect", str(bundle.path)]).stdout
    for words in (
        "family        Fish Audio S2-Pro\n",
        "recipe        int4, fast_ar.output=int4\n",
        "precision     codec_encode fp32; codec_decode fp32; slow_ar int4 (10 layers), ",
        "0 codes differ",
        "licence       Fish Audio Research License (of the published Fish Audio S2-Pro; the checkpoint names none)\n",
    ):
        assert words in shown, shown
