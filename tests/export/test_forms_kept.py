"""Integers of a checkpoint that a bundle keeps: products are those of the widened weights, and so are the codes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

import form_samples
from fishrt import TTS
from fishrt.bundle.folder import Bundle
from fishrt_engines import open_engine
from fishrt_engines.engine import GraphSpec, TensorSpec
from fishrt_export import Options, export_bundle
from fishrt_export.checkpoint.forms.folder import Checkpoint
from fishrt_export.checkpoint.quantised.integers import Integers, Packed, joined, rows_of, without_orders
from fishrt_export.checkpoint.quantised.layers import Layer, makers_of
from fishrt_export.checkpoint.weights import Lazy
from fishrt_export.errors import ExportError
from fishrt_export.graph.kept.blocks import blocks_of, stored_bits
from fishrt_export.graph.recipe import Storage, kept_storage
from fishrt_export.graph.store import store
from fishrt_export.graph.verify import Held
from fishrt_export.sources.language_model import open_language_model
from form_samples import HALVES, SAMPLES

SPEC = GraphSpec(
    "graph.onnx", (TensorSpec("x", "float32", ("batch", "length", 192)),), (TensorSpec("y", "float32", ("batch", "length", 24)),)
)


def packed(form: str, parts: dict[str, Any]) -> Packed:
    tensors = {end: torch.from_numpy(np.ascontiguousarray(part)) for end, part in parts.items()}
    layer = Layer("layer", {end: partial(tensors.__getitem__, end) for end in tensors}, 192)
    made = makers_of(form, layer)
    assert isinstance(made, Packed)
    return made


def gptq(**options: Any) -> Callable[[], Packed]:
    options = {"bits": 4, "group": 32, "act_order": False, "sym": True, **options}
    return lambda: packed("gptq", form_samples.gptq(np.random.default_rng(1), 24, 192, v1=True, **options)[0])


def mlx(bits: int, group: int) -> Callable[[], Packed]:
    return lambda: packed("mlx", form_samples.mlx(np.random.default_rng(1), 24, 192, bits=bits, group=group)[0])


def int8(end: str) -> Callable[[], Packed]:
    def make() -> Packed:
        rng = np.random.default_rng(1)
        weight = rng.integers(-128, 128, (24, 192)).astype(np.int8)
        return packed("bnb8" if end == ".SCB" else "int8", {".weight": weight, end: rng.uniform(0.1, 3, 24).astype(np.float32)})

    return make


FORMS = {
    "GPTQ": gptq(),
    "GPTQ, 8 bits": gptq(bits=8),
    "GPTQ, one group": gptq(group=-1),
    "GPTQ, groups of 48": gptq(group=48),
    "GPTQ, zero points": gptq(sym=False),
    "GPTQ, 8 bits, zero points": gptq(bits=8, sym=False),
    "GPTQ, act-order": gptq(act_order=True),
    "GPTQ, act-order, zero points": gptq(act_order=True, sym=False, bits=8),
    "MLX, 4 bits": mlx(4, 64),
    "MLX, 8 bits": mlx(8, 32),
    "int4 of the originals": lambda: packed(
        "tiles", form_samples.tiles(np.random.default_rng(1), 24, 192, group=64, inner=4, padded=192)[0]
    ),
    "int8 of the originals": int8(".scales"),
    "LLM.int8": int8(".SCB"),
}


def graph(weight: torch.Tensor) -> ir.Model:
    """y = x · weightᵀ, as the exporter traces a linear layer."""
    x = ir.val("x", ir.DataType.FLOAT, ["batch", "length", 192])
    stored = ir.Value(name="layer.weight", const_value=ir.tensor(weight.numpy(), name="layer.weight"))
    tape = ir.tape.Tape()
    y = tape.op("MatMul", [x, tape.op("Transpose", [stored], {"perm": [1, 0]})])
    y.name, y.shape, y.type = "y", ir.Shape(["batch", "length", 24]), ir.TensorType(ir.DataType.FLOAT)
    made = ir.Graph([x], [y], nodes=tape.nodes, initializers=[stored], opset_imports={"": 24}, name="graph")
    return ir.Model(made, ir_version=10)


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_a_product_is_that_of_the_widened_weight(tmp_path: Path, make: Callable[[], Packed]) -> None:
    made = make()
    weight, integers = made(), made.read()
    blocks = blocks_of(integers)
    assert blocks is not None
    assert (blocks.widened() - weight).abs().max() <= 2e-7 * weight.abs().max()
    plan = {"layer.weight": Storage(f"int{stored_bits(integers)}", blocks.block, kept=True)}
    weights = Lazy({"layer.weight": made})
    store(graph(weight), tmp_path / SPEC.file, weights, plan)
    held = Held(tmp_path / SPEC.file, weights, plan)
    assert (held["layer.weight"] - weight).abs().max() <= 2e-7 * weight.abs().max()
    assert held.errors["layer.weight"] < 1e-6
    x = np.random.default_rng(2).standard_normal((2, 3, 192)).astype(np.float32)
    found = open_engine(tmp_path / SPEC.file, SPEC, provider="cpu").run({"x": x})["y"]
    wanted = x.astype(np.float64) @ weight.double().numpy().T
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()
    assert "MatMulNBits" in fused(tmp_path / SPEC.file)


def fused(path: Path) -> list[str]:
    """The operators after ONNX Runtime's optimisation."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_name("optimised.onnx"))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(path.with_name("optimised.onnx"), load_external_data=False).graph.node]


TABLES = {
    "MLX, 4 bits": mlx(4, 64),
    "MLX, 8 bits": mlx(8, 32),
    "blocks of GGUF": lambda: Packed(
        lambda: Integers(torch.randint(-128, 128, (24, 192), dtype=torch.int8), torch.rand(24, 6), 8)
    ),
}


@pytest.mark.parametrize("make", TABLES.values(), ids=TABLES)
def test_a_lookup_is_a_row_of_the_widened_table(tmp_path: Path, make: Callable[[], Packed]) -> None:
    torch.manual_seed(0)
    integers = make().read()
    made = Packed(lambda: integers)
    table = made()
    storage = kept_storage(made, table=True)
    assert storage is not None
    ids = ir.val("ids", ir.DataType.INT64, ["batch", "length"])
    stored = ir.Value(name="layer.weight", const_value=ir.tensor(table.numpy(), name="layer.weight"))
    tape = ir.tape.Tape()
    rows = tape.op("Identity", [tape.op("Gather", [stored, ids])])
    rows.name, rows.shape, rows.type = "y", ir.Shape(["batch", "length", 192]), ir.TensorType(ir.DataType.FLOAT)
    model = ir.Graph([ids], [rows], nodes=tape.nodes, initializers=[stored], opset_imports={"": 24}, name="graph")
    weights, plan = Lazy({"layer.weight": made}), {"layer.weight": storage}
    spec = GraphSpec(
        "table.onnx", (TensorSpec("ids", "int64", ("batch", "length")),), (TensorSpec("y", "float32", ("batch", "length", 192)),)
    )
    store(ir.Model(model, ir_version=10), tmp_path / spec.file, weights, plan)
    assert (Held(tmp_path / spec.file, weights, plan)["layer.weight"] - table).abs().max() <= 2e-7 * table.abs().max()
    wanted = np.array([[3, 0, 23], [5, 5, 1]])
    found = open_engine(tmp_path / spec.file, spec, provider="cpu").run({"ids": wanted})["y"]
    assert np.abs(found - table.numpy()[wanted]).max() <= 2e-7 * table.abs().max()
    assert (tmp_path / "table.onnx.data").stat().st_size < table.nbytes / 2


def test_what_no_block_holds() -> None:
    values, scales = torch.zeros(4, 24, dtype=torch.int8), torch.ones(4, 3)
    assert blocks_of(Integers(values, scales, 4)) is None  # groups of 8
    uneven = Integers(values, torch.ones(4, 2), 4, groups=torch.tensor([0] * 20 + [1] * 4))
    assert blocks_of(uneven) is None


def test_rows_of_integers_are_integers() -> None:
    for make in FORMS.values():
        whole = make()
        part = rows_of(whole, torch.tensor([5, 2]))
        assert isinstance(part, Packed)
        assert torch.equal(part(), whole()[[5, 2]])
        assert torch.allclose(part.read().widened(), whole()[[5, 2]], rtol=3e-7, atol=0)


def test_joined_integers_are_integers() -> None:
    simple = joined([gptq()(), gptq()()])
    assert isinstance(simple, Packed)
    assert torch.equal(simple(), torch.cat([gptq()()(), gptq()()()]))
    mixed = joined([gptq()(), gptq(sym=False)()])
    assert not isinstance(mixed, Packed)
    assert torch.equal(mixed(), torch.cat([gptq()()(), gptq(sym=False)()()]))


def test_the_order_of_w2_goes_into_w1_and_w3() -> None:
    w1, w2, w3 = torch.randn(192, 8), gptq(act_order=True)(), torch.randn(192, 8)
    names = [f"layers.0.feed_forward.{part}.weight" for part in ("w1", "w2", "w3")]
    found = without_orders(Lazy(dict(zip(names, (lambda: w1, w2, lambda: w3), strict=True))))
    x = torch.randn(5, 8)
    one, two, three = (found[name] for name in names)
    assert torch.allclose((x @ one.T * (x @ three.T)) @ two.T, (x @ w1.T * (x @ w3.T)) @ w2().T, rtol=1e-4, atol=1e-4)
    assert not torch.equal(one, w1)


# ---- whole bundles


def exported(form: str, out: Path, **options: Any) -> Bundle:
    return export_bundle(SAMPLES / form, out, Options(**HALVES, **options))


@pytest.mark.slow
def test_a_bundle_of_integers_speaks_as_its_twin_of_floats(tmp_path: Path) -> None:
    sample = SAMPLES / "gptq-act-order"
    bundle = exported(sample.name, tmp_path / "integers")
    assert bundle.manifest.quantisation is not None
    layers = {layer.name: layer for layer in bundle.manifest.quantisation.layers if layer.block}
    assert len(layers) == 9
    assert {(layer.precision, layer.block, layer.error) for layer in layers.values()} == {("int4", 32, 0.0)}
    source = open_language_model(Checkpoint.of(sample, **HALVES))
    twin = tmp_path / "twin"
    twin.mkdir()
    shutil.copy(sample / "config.json", twin)
    save_file({name: tensor.float().contiguous() for name, tensor in source.weights.items()}, twin / "model.safetensors")
    config = (twin / "config.json").read_text()
    assert "quantization_config" in config
    floats = export_bundle(twin, tmp_path / "floats", Options(**HALVES))
    assert codes(bundle) == codes(floats)


def codes(bundle: Bundle) -> list[list[int]]:
    with TTS.load(bundle.path, provider="cpu", threads=1) as tts:
        found: list[list[int]] = tts.speak("Hello.", seed=3, max_frames=12).codes.tolist()
        return found


def test_a_second_rounding_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from fishrt_export.planning.dual_ar import plan_dual_ar

    plan_dual_ar(SAMPLES / "gptq-act-order", tmp_path, Options(precision="int4", **HALVES))
    assert "rounded already (GPTQ, act-order, 4 bits), and --precision int4 rounds them a second time" in caplog.text


def test_tensorrt_takes_no_zero_points(tmp_path: Path) -> None:
    from fishrt_export.planning.dual_ar import plan_dual_ar

    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(SAMPLES / "gptq-act-order", checkpoint)
    change_zeros(checkpoint / "model.safetensors")
    with pytest.raises(ExportError, match="TensorRT takes no zero points") as caught:
        plan_dual_ar(checkpoint, tmp_path / "out", Options(targets=["tensorrt"], **HALVES))
    assert "--precision int8" in str(caught.value.hint)


def change_zeros(path: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("qzeros")]:
        tensors[name] = tensors[name] ^ 0x3
    save_file(tensors, path)
