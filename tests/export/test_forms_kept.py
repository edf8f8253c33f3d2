"""Integers of a checkpoint that a bundle keeps: products are those of the widened weights, and so are the codes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

import form_samples
from fishrt_engines import open_engine
from fishrt_engines.engine import GraphSpec, TensorSpec
from fishrt_export import Options
from fishrt_export.checkpoint.forms.gguf import GgufTensor
from fishrt_export.checkpoint.quantised.blocks import maker
from fishrt_export.checkpoint.quantised.integers import Integers, Packed, joined, rows_of, without_orders
from fishrt_export.checkpoint.quantised.layers import Layer, makers_of
from fishrt_export.checkpoint.quantised.levels import TABLES as KNOWN
from fishrt_export.checkpoint.weights import Lazy
from fishrt_export.errors import ExportError
from fishrt_export.graph.kept.blocks import blocks_of, stored_bits
from fishrt_export.graph.kept.tables import value_of
from fishrt_export.graph.recipe import Storage, kept_storage
from fishrt_export.graph.store import store
from fishrt_export.graph.verify import Held
from fishrt_export.targets.forms import make_forms
from form_samples import HALVES, SAMPLES

INPUTS = 192


def spec(inputs: int = INPUTS) -> GraphSpec:
    x, y = (TensorSpec(name, "float32", ("batch", "length", width)) for name, width in (("x", inputs), ("y", 24)))
    return GraphSpec("graph.onnx", (x,), (y,))


def packed(form: str, parts: dict[str, Any]) -> Packed:
    tensors = {end: torch.from_numpy(np.ascontiguousarray(part)) for end, part in parts.items()}
    layer = Layer("layer", {end: partial(tensors.__getitem__, end) for end in tensors}, INPUTS)
    made = makers_of(form, layer)
    assert isinstance(made, Packed)
    return made


def gptq(**options: Any) -> Callable[[], Packed]:
    options = {"bits": 4, "group": 32, "act_order": False, "sym": True, **options}
    return lambda: packed("gptq", form_samples.gptq(np.random.default_rng(1), 24, INPUTS, v1=True, **options)[0])


def mlx(bits: int, group: int) -> Callable[[], Packed]:
    return lambda: packed("mlx", form_samples.mlx(np.random.default_rng(1), 24, INPUTS, bits=bits, group=group)[0])


def gguf(kind: str) -> Callable[[], Packed]:
    def make() -> Packed:
        with NamedTemporaryFile() as file:
            file.write(form_samples.gguf_blocks(kind, 24, 256))
            file.flush()
            read = maker(Path(file.name), GgufTensor(kind, (24, 256), 0, file.tell()))
            assert isinstance(read, Packed)
            integers = read.read()
        return Packed(lambda: integers)

    return make


def int8(end: str) -> Callable[[], Packed]:
    def make() -> Packed:
        rng = np.random.default_rng(1)
        weight = rng.integers(-128, 128, (24, INPUTS)).astype(np.int8)
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
        "tiles", form_samples.tiles(np.random.default_rng(1), 24, INPUTS, group=64, inner=4, padded=INPUTS)[0]
    ),
    "int8 of the originals": int8(".scales"),
    "LLM.int8": int8(".SCB"),
    **{f"GGUF, {kind}": gguf(kind) for kind in form_samples.GGUF},
}


def graph(weight: torch.Tensor) -> ir.Model:
    """y = x · weightᵀ, as the exporter traces a linear layer."""
    x = ir.val("x", ir.DataType.FLOAT, ["batch", "length", weight.shape[1]])
    stored = value_of(ir.tensor(weight.numpy(), name="layer.weight"))
    tape = ir.tape.Tape()
    y = tape.op("MatMul", [x, tape.op("Transpose", [stored], {"perm": [1, 0]})])
    y.name, y.shape, y.type = "y", ir.Shape(["batch", "length", 24]), ir.TensorType(ir.DataType.FLOAT)
    made = ir.Graph([x], [y], nodes=tape.nodes, initializers=[stored], opset_imports={"": 24}, name="graph")
    return ir.Model(made, ir_version=10)


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_a_product_is_that_of_the_widened_weight(tmp_path: Path, make: Callable[[], Packed]) -> None:
    made = make()
    weight, integers = made(), made.read()
    described = spec(weight.shape[1])
    blocks = blocks_of(integers)
    assert blocks is not None
    assert (blocks.widened() - weight).abs().max() <= 2e-7 * weight.abs().max()
    plan = {"layer.weight": Storage(f"int{stored_bits(integers)}", blocks.block, kept=True)}
    weights = Lazy({"layer.weight": made})
    store(graph(weight), tmp_path / described.file, weights, plan)
    held = Held(tmp_path / described.file, weights, plan)
    assert (held["layer.weight"] - weight).abs().max() <= 2e-7 * weight.abs().max()
    assert held.errors["layer.weight"] < 1e-6
    x = np.random.default_rng(2).standard_normal((2, 3, described.inputs[0].shape[-1])).astype(np.float32)
    found = open_engine(tmp_path / described.file, described, provider="cpu").run({"x": x})["y"]
    wanted = x.astype(np.float64) @ weight.double().numpy().T
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()
    assert "MatMulNBits" in fused(tmp_path / described.file)


def fused(path: Path) -> list[str]:
    """The operators after ONNX Runtime's optimisation."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_name("optimised.onnx"))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(path.with_name("optimised.onnx"), load_external_data=False).graph.node]


LEVELS_OF = {
    "NF4": {"kind": "nf4", "block": 64},
    "NF4, nested": {"kind": "nf4", "block": 64, "nested": 4},
    "NF4, large blocks": {"kind": "nf4", "block": 512},
    "FP4": {"kind": "fp4", "block": 64},
}


def levels(*, kind: str, block: int, nested: int | None = None, inputs: int = INPUTS) -> Packed:
    rng = np.random.default_rng(1)
    return packed("bnb4", form_samples.bnb4(rng, 24, inputs, kind=kind, block=block, nested=nested, table=KNOWN[kind])[0])


@pytest.mark.parametrize("options", LEVELS_OF.values(), ids=LEVELS_OF)
def test_a_product_is_that_of_the_table_of_codes(tmp_path: Path, options: dict[str, Any]) -> None:
    made = levels(**options)
    weight, storage = made(), kept_storage(made, table=False)
    assert storage is not None
    assert storage.precision == options["kind"]
    weights, plan = Lazy({"layer.weight": made}), {"layer.weight": storage}
    memory = store(graph(weight), tmp_path / spec().file, weights, plan)
    bits = 4 + 32 / storage.block
    assert memory == bits / 8 * weight.numel()
    assert (tmp_path / "graph.onnx.data").stat().st_size < 1.1 * memory
    assert {node.domain for node in onnx.load(tmp_path / spec().file, load_external_data=False).graph.node} == {""}
    stored = {t.name: list(t.dims) for t in onnx.load(tmp_path / spec().file, load_external_data=False).graph.initializer}
    assert len(stored["layer.weight"]) == len(stored[f"layer.weight.{options['kind']}"]) - 1 == 3  # no vector: see kept/levels.py
    held = Held(tmp_path / spec().file, weights, plan)
    assert torch.equal(held["layer.weight"], weight)
    (form,) = make_forms(tmp_path, "slow_ar", spec(), {"cpu"})
    assert not form.spec.rounds_activations
    assert [node.op_type for node in onnx.load(tmp_path / form.spec.file, load_external_data=False).graph.node] == ["MatMulBnb4"]
    assert not (tmp_path / f"{form.spec.file}.data").exists()
    x = np.random.default_rng(2).standard_normal((2, 3, INPUTS)).astype(np.float32)
    wanted = x.astype(np.float64) @ weight.double().numpy().T
    for each in (spec(), form.spec):
        found = open_engine(tmp_path / each.file, each, provider="cpu").run({"x": x})["y"]
        assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_product_in_16_bits_has_one_type(tmp_path: Path, kind: str) -> None:
    made = levels(kind=kind, block=64)
    plan = {"layer.weight": Storage(kind, 64, kept=True)}
    store(graph(made()), tmp_path / spec().file, Lazy({"layer.weight": made}), plan)
    forms = make_forms(tmp_path, "slow_ar", spec(), {"cuda"})
    assert [form.spec.file for form in forms] == ["graph_float16.onnx"]
    model = onnx.load(tmp_path / "graph_float16.onnx")
    assert [node.op_type for node in model.graph.node] == ["Cast", "MatMulBnb4", "Cast"]
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert [types[name] for name in model.graph.node[1].input[1:]] == [onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT16]


def test_offsets_in_16_bits_have_the_type_of_their_product(tmp_path: Path) -> None:
    """In another type, a cast would stand between a layer and the attention, which no fast operator would replace."""
    made = mlx(8, 32)()
    store(graph(made()), tmp_path / spec().file, Lazy({"layer.weight": made}), {"layer.weight": Storage("int8", 32, kept=True)})
    (form,) = make_forms(tmp_path, "slow_ar", spec(), {"cuda"})
    nodes = onnx.load(tmp_path / form.spec.file).graph.node
    makers = {name: node for node in nodes for name in node.output}
    (total,) = [node for node in nodes if node.op_type == "Add"]
    assert "MatMul" in {makers[name].op_type for name in total.input}
    assert [node.op_type for node in nodes if total.output[0] in node.input] == ["Cast"]  # the result


def test_codes_that_no_graph_holds() -> None:
    assert levels(kind="nf4", block=64, inputs=48).read().block == 16  # smaller blocks, with the same numbers
    assert kept_storage(levels(kind="nf4", block=64, inputs=24), table=False) is None
    other = packed("bnb4", form_samples.bnb4(np.random.default_rng(1), 24, INPUTS, block=64, nested=None)[0])
    assert kept_storage(other, table=False) is None  # another table


TABLES = {
    "MLX, 4 bits": mlx(4, 64),
    "MLX, 8 bits": mlx(8, 32),
    "blocks of GGUF": lambda: Packed(
        lambda: Integers(torch.randint(-128, 128, (24, INPUTS), dtype=torch.int8), torch.rand(24, 6), 8)
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
    rows.name, rows.shape, rows.type = "y", ir.Shape(["batch", "length", INPUTS]), ir.TensorType(ir.DataType.FLOAT)
    model = ir.Graph([ids], [rows], nodes=tape.nodes, initializers=[stored], opset_imports={"": 24}, name="graph")
    weights, plan = Lazy({"layer.weight": made}), {"layer.weight": storage}
    x, y = TensorSpec("ids", "int64", ("batch", "length")), TensorSpec("y", "float32", ("batch", "length", INPUTS))
    described = GraphSpec("graph.onnx", (x,), (y,))
    store(ir.Model(model, ir_version=10), tmp_path / described.file, weights, plan)
    assert (Held(tmp_path / described.file, weights, plan)["layer.weight"] - table).abs().max() <= 2e-7 * table.abs().max()
    wanted = np.array([[3, 0, 23], [5, 5, 1]])
    found = open_engine(tmp_path / described.file, described, provider="cpu").run({"ids": wanted})["y"]
    assert np.abs(found - table.numpy()[wanted]).max() <= 2e-7 * table.abs().max()
    assert (tmp_path / "graph.onnx.data").stat().st_size < table.nbytes / 2


def test_what_no_block_holds() -> None:
    values, scales = torch.zeros(4, 24, dtype=torch.int8), torch.ones(4, 3)
    assert blocks_of(Integers(values, scales, 4)) is None  # groups of 8
    uneven = Integers(values, torch.ones(4, 2), 4, groups=torch.tensor([0] * 20 + [1] * 4))
    assert blocks_of(uneven) is None


def test_rows_of_integers_are_integers() -> None:
    of_codes = {name: partial(levels, **options) for name, options in LEVELS_OF.items()}
    for make in (*FORMS.values(), *of_codes.values()):
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
    w1, w2, w3 = torch.randn(INPUTS, 8), gptq(act_order=True)(), torch.randn(INPUTS, 8)
    names = [f"layers.0.feed_forward.{part}.weight" for part in ("w1", "w2", "w3")]
    found = without_orders(Lazy(dict(zip(names, (lambda: w1, w2, lambda: w3), strict=True))))
    x = torch.randn(5, 8)
    one, two, three = (found[name] for name in names)
    assert torch.allclose((x @ one.T * (x @ three.T)) @ two.T, (x @ w1.T * (x @ w3.T)) @ w2().T, rtol=1e-4, atol=1e-4)
    assert not torch.equal(one, w1)


# ---- plans


def test_a_second_rounding_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from fishrt_export.planning.dual_ar import plan_dual_ar

    plan_dual_ar(SAMPLES / "gptq-act-order", tmp_path, Options(precision="int4", **HALVES))
    assert "rounded already (GPTQ, act-order, 4 bits), and --precision int4 rounds them a second time" in caplog.text


def test_tensorrt_takes_no_zero_points(tmp_path: Path) -> None:
    from fishrt_export.planning.dual_ar import plan_dual_ar

    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(SAMPLES / "gptq-act-order", checkpoint)
    change_zeros(checkpoint / "model.safetensors")
    with pytest.raises(ExportError, match="TensorRT takes no zero points, as the integers of slow_ar") as caught:
        plan_dual_ar(checkpoint, tmp_path / "out", Options(targets=["tensorrt"], **HALVES))
    assert "--precision int8" in str(caught.value.hint)


def test_tensorrt_takes_no_codes_of_a_table(tmp_path: Path) -> None:
    from fishrt_export.planning.dual_ar import plan_dual_ar

    with pytest.raises(ExportError, match="TensorRT takes no codes of a table, as the weights of slow_ar") as caught:
        plan_dual_ar(SAMPLES / "bnb-nf4", tmp_path / "out", Options(targets=["tensorrt"], **HALVES))
    assert "--precision int8" in str(caught.value.hint)


def test_tensorrt_looks_up_no_integers(tmp_path: Path) -> None:
    from fishrt_export.planning.dual_ar import plan_dual_ar

    options = {"targets": ["tensorrt"], **HALVES}
    with pytest.raises(ExportError, match=r"no lookups in integers, as those of slow_ar.embeddings.weight have") as caught:
        plan_dual_ar(SAMPLES / "mlx-8bit", tmp_path / "out", Options(**options))
    assert "--keep '*embeddings=fp32'" in str(caught.value.hint)
    plan = plan_dual_ar(SAMPLES / "mlx-8bit", tmp_path / "out", Options(keep={"*embeddings": "fp32"}, **options))
    storage = {name: stored.precision for job in plan.jobs for name, stored in job.plan.items()}
    assert (storage["embeddings.weight"], storage["layers.0.attention.wo.weight"]) == ("fp32", "int8")


def change_zeros(path: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("qzeros")]:
        tensors[name] = tensors[name] ^ 0x3
    save_file(tensors, path)
