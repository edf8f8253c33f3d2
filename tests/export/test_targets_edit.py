"""Editing of graph files: weights stay in their files, unread; errors of damaged bundles; no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

pytest.importorskip("onnx_ir", reason="needs the export extra")

import onnx_ir as ir

import fishrt_export.targets
from fishrt_export.errors import ExportError
from fishrt_export.targets import edit
from helpers_graphs import places

WEIGHTS = np.arange(16, dtype=np.float32).reshape(4, 4)


def write(folder: Path, location: str = "g.onnx.data", *, rows: int = 4, length: int = 64, offset: int = 64) -> Path:
    """Write the graph y = x @ w + b, without the file of w."""
    w = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, rows], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        w.external_data.add(key=key, value=value)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["product"]), helper.make_node("Add", ["product", "b"], ["y"])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in (("x", 4), ("y", rows)))
    b = helper.make_tensor("b", TensorProto.FLOAT, [1], [0.5])
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], [w, b]), opset_imports=[helper.make_opsetid("", 24)])
    (folder / "g.onnx").write_bytes(model.SerializeToString())
    return folder / "g.onnx"


def test_a_form_names_the_weights_of_the_portable_graph(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "g.onnx.data").write_bytes(bytes(64) + WEIGHTS.tobytes())
    model = edit.load(path)
    edit.infer(model)
    assert [node.outputs[0].dtype for node in model.graph] == [ir.DataType.FLOAT] * 2
    big, small = edit.constant(model.graph, "big", np.ones((4, 512)), np.float32), edit.constant(model.graph, "small", [1, 2])
    assert edit.constant(model.graph, "big", 0) is big
    for value in (big, small):
        model.graph.append(ir.node("Identity", [value], outputs=[ir.Value(name=f"{value.name}.out", type=value.type)]))
        model.graph.outputs.append(model.graph[-1].outputs[0])
    edit.tidy(model)
    edit.save(model, tmp_path / "form.onnx")
    found = places(tmp_path / "form.onnx")
    assert found["w"] == places(path)["w"]
    assert found["big"] == {"location": "form.onnx.data", "offset": "0", "length": "8192"}
    assert found.keys() == {"w", "big"}
    again = edit.load(tmp_path / "form.onnx")
    np.testing.assert_array_equal(edit.numbers(again.graph.initializers["w"]), WEIGHTS)
    np.testing.assert_array_equal(edit.numbers(again.graph.initializers["big"]), np.ones((4, 512)))
    assert (tmp_path / "g.onnx.data").read_bytes() == bytes(64) + WEIGHTS.tobytes()


def test_weights_are_not_read(tmp_path: Path) -> None:
    """64 GiB of them, in a sparse file, take no time and no memory."""
    rows = 2**32
    path = write(tmp_path, rows=rows, length=16 * rows, offset=0)
    with (tmp_path / "g.onnx.data").open("wb") as file:
        file.truncate(16 * rows)
    model = edit.load(path)
    edit.infer(model)
    edit.tidy(model)
    edit.save(model, tmp_path / "form.onnx")
    assert places(tmp_path / "form.onnx") == places(path)


def test_nodes_are_sorted_and_what_no_result_needs_is_removed(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "g.onnx.data").write_bytes(bytes(64) + WEIGHTS.tobytes())
    model = edit.load(path)
    product, total = model.graph
    edit.infer(model)
    model.graph.remove(product)
    model.graph.append(product)
    edit.constant(model.graph, "unused", [1])
    model.opset_imports[edit.MICROSOFT] = 1
    edit.tidy(model)
    assert list(model.graph) == [product, total]
    assert model.graph.initializers.keys() == {"w", "b"}
    assert model.opset_imports == {"": 24}
    assert (product.outputs[0].type, total.outputs[0].dtype) == (None, ir.DataType.FLOAT)


def test_producers_readers_and_constants(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "g.onnx.data").write_bytes(bytes(64) + WEIGHTS.tobytes())
    product, total = edit.load(path).graph
    x, w = product.inputs
    assert edit.producer(total.inputs[0], "MatMul") is product
    assert edit.producer(total.inputs[0], "Gemm") is edit.producer(x, "MatMul") is edit.producer(None, "MatMul") is None
    assert edit.only_reader(product.outputs[0], "Add") is total
    assert edit.only_reader(product.outputs[0], "Mul") is edit.only_reader(total.outputs[0], "Add") is None
    assert [edit.is_constant(value) for value in (x, w, product.outputs[0], None)] == [False, True, False, False]
    assert edit.is_constant(ir.node("Cast", [w], {"to": 10}).outputs[0])


@pytest.mark.parametrize(
    ("size", "location", "text"),
    [
        (None, "g.onnx.data", "cannot be read"),
        (100, "g.onnx.data", "end before w"),
        (128, "../g.onnx.data", "outside of its folder"),
        (128, "/g.onnx.data", "outside of its folder"),
    ],
)
def test_weights_that_are_not_there_are_an_error(tmp_path: Path, size: int | None, location: str, text: str) -> None:
    (tmp_path / "bundle").mkdir()
    path = write(tmp_path / "bundle", location)
    if size is not None:
        (path.parent / "g.onnx.data").write_bytes(bytes(size))
    with pytest.raises(ExportError, match=text):
        edit.load(path)


@pytest.mark.parametrize("content", [None, b"<html>"])
def test_what_is_no_graph_is_an_error(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "g.onnx").write_bytes(content)
    with pytest.raises(ExportError, match=r"g\.onnx cannot be read as a graph"):
        edit.load(tmp_path / "g.onnx")


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_weights_behind_a_link_are_read(tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    """A model hub's cache links the files of a bundle from a folder of its own; `fishrt retarget` links those that stay."""
    for name in ("blobs", "bundle"):
        (tmp_path / name).mkdir()
    (tmp_path / "blobs/1").write_bytes(bytes(64) + WEIGHTS.tobytes())
    path = write(tmp_path / "bundle")
    link(tmp_path / "blobs/1", tmp_path / "bundle/g.onnx.data")
    model = edit.load(path)
    w = model.graph.initializers["w"]
    np.testing.assert_array_equal(edit.numbers(w), WEIGHTS)
    assert w.const_value is not None
    np.testing.assert_array_equal(w.const_value.numpy(), WEIGHTS)  # as onnxscript's optimiser reads them
    edit.save(model, tmp_path / "bundle/form.onnx")
    assert places(tmp_path / "bundle/form.onnx")["w"]["location"] == "g.onnx.data"


def test_a_type_that_stays_unknown_is_an_error() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    node = ir.node("Unheard", [x], outputs=[ir.Value(name="y")], domain="of.nobody")
    model = ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 24, "of.nobody": 1}), ir_version=10)
    with pytest.raises(ExportError, match=r"the type of y \(Unheard\)"):
        edit.infer(model)


def test_targets_need_no_torch() -> None:
    """In a process of its own, in which torch cannot be imported."""
    files = sorted(Path(str(fishrt_export.targets.__file__)).parent.glob("*.py"))
    names = ", ".join(f"fishrt_export.targets.{file.stem}" for file in files if file.stem != "__init__")
    assert "targets.edit" in names
    code = f"import sys; sys.modules['torch'] = None; import {names}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
