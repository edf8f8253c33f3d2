"""Graphs for a CUDA device as ONNX Runtime places their nodes: nothing is copied between device and host within a call.

No device is at hand: `cuda_placement` repeats ONNX Runtime's rule.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from cuda_placement import copied_values
from fishrt.bundle.folder import Bundle, embedded_bundle
from fishrt_export.targets import edit
from fishrt_export.targets.attention import fast_operators
from fishrt_export.targets.forms import device_form
from helpers_graphs import copied
from tiny import GoldenModel

pytest.importorskip("torch", reason="needs the export extra")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_language_model_copies_nothing(golden_model: GoldenModel, tmp_path: Path, dtype: str) -> None:
    slow, frame = (
        golden_model._job("slow_ar", "audio").spec,
        golden_model.lm.frame_job(golden_model.few, {}).spec,
    )
    for role in ("slow_ar", "fast_ar"):
        copied(golden_model.file(role), tmp_path)
    shutil.copy(golden_model.frame_file(golden_model.few), tmp_path)
    for spec in (slow, frame):
        form = device_form(tmp_path, spec, dtype)
        assert form is None or copied_values(tmp_path / form.file) == []


@pytest.mark.parametrize("role", ["codec_encode", "codec_decode"])
def test_a_codec_copies_nothing(golden_model: GoldenModel, role: str) -> None:
    assert copied_values(golden_model.file(role)) == []


def test_no_form_of_the_embedded_voice_copies() -> None:
    bundle = Bundle.load(embedded_bundle())
    forms = [form for graph in bundle.manifest.graphs.values() for form in graph.forms if form.provider == "cuda"]
    assert {form.spec.file.split("_")[0] for form in forms} == {"slow", "frame"}
    for form in forms:
        assert copied_values(bundle.file(form.spec.file)) == []


@pytest.mark.parametrize(("cuda", "copies"), [(True, 0), (False, 1)])
def test_rows_that_are_computed_in_the_graph_are_copied(tmp_path: Path, cuda: bool, copies: int) -> None:
    """The attention reads their number on the host: for a device, it is a feed."""
    model = edit.load(embedded_bundle() / "slow_ar.onnx")
    assert fast_operators(model, cuda=cuda)
    ir.save(model, tmp_path / "form.onnx")
    assert len(copied_values(tmp_path / "form.onnx")) == copies


def write(folder: Path, nodes: list[onnx.NodeProto], result: int) -> Path:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", result, None)
    constants = [helper.make_tensor("two", TensorProto.INT64, [1], [2]), helper.make_tensor("flat", TensorProto.INT64, [1], [-1])]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], constants), opset_imports=[helper.make_opsetid("", 24)])
    (folder / "g.onnx").write_bytes(model.SerializeToString())
    return folder / "g.onnx"


def test_sizes_stay_on_the_host(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Exp", ["x"], ["e"]),
        helper.make_node("Shape", ["e"], ["shape"]),
        helper.make_node("Mul", ["shape", "two"], ["double"]),
        helper.make_node("Expand", ["e", "double"], ["y"]),
    ]
    assert copied_values(write(tmp_path, nodes, TensorProto.FLOAT)) == []


def test_a_size_that_is_used_as_a_number_is_copied(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Exp", ["x"], ["e"]),
        helper.make_node("Shape", ["e"], ["shape"]),
        helper.make_node("Cast", ["shape"], ["size"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["e", "size"], ["y"]),
    ]
    assert copied_values(write(tmp_path, nodes, TensorProto.FLOAT)) == ["size"]


def test_a_number_that_is_used_as_a_size_is_copied(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["whole", "flat"], ["sizes"]),
        helper.make_node("ConstantOfShape", ["sizes"], ["y"]),
    ]
    assert copied_values(write(tmp_path, nodes, TensorProto.FLOAT)) == ["sizes"]


def test_an_operator_without_a_kernel_is_copied_to_and_from(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Exp", ["x"], ["e"]),
        helper.make_node("Swish", ["e"], ["s"]),
        helper.make_node("Exp", ["s"], ["y"]),
    ]
    assert copied_values(write(tmp_path, nodes, TensorProto.FLOAT)) == ["e", "s"]
