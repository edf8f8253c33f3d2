"""The codec's decoder with convolutions in 8 bits: its graph, its error, and its use."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from fishrt.bundle.folder import Bundle
from fishrt.bundle.graphs import BundleGraphs
from fishrt.bundle.manifest import Form, Rounding
from fishrt.codec import CodecDecoder
from fishrt.metrics import signal_over_error
from fishrt_engines import Engine, machine, open_engine
from fishrt_engines.engine import GraphSpec, TensorSpec
from helpers_text import listed
from tiny import GoldenModel

pytest.importorskip("torch", reason="needs the export extra")

from fishrt_export import Options, export_bundle
from fishrt_export.errors import ExportError
from fishrt_export.targets.codec import int8
from fishrt_export.targets.codec.rows import Range

FILE = "codec_decode_int8.onnx"


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """S2's bundle with the graph in 8 bits: all its layers, which have few channels, and its transformer of 64."""
    folder = Path(shutil.copytree(tiny_bundle.path, tmp_path_factory.mktemp("int8") / "bundle"))
    manifest = tiny_bundle.manifest
    decode = manifest.graphs["codec_decode"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "BLOCK", 32)
        form = int8.int8_form(folder, decode.spec, manifest.codec.codebook_sizes, manifest.codec.hop)
    graphs = {**manifest.graphs, "codec_decode": replace(decode, forms=(form,))}
    return listed(folder, replace(tiny_bundle, manifest=replace(manifest, graphs=graphs)))


@pytest.fixture(scope="module")
def exact(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same bundle, with exact products on every CPU, with VNNI or without."""
    folder = Path(shutil.copytree(bundle.path, tmp_path_factory.mktemp("exact") / "bundle"))
    model = ir.load(folder / FILE)
    int8.make_exact(model)
    ir.save(model, folder / FILE)
    return listed(folder, bundle)


@pytest.fixture
def vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_features", lambda: ["avx2", "avx512_vnni"])


def report_of(bundle: Bundle) -> Rounding:
    (form,) = bundle.manifest.graphs["codec_decode"].forms
    assert form.rounding is not None
    return form.rounding


def engine_of(bundle: Bundle) -> Engine:
    return BundleGraphs(bundle, "cpu", 1)["codec_decode"]


def decoded(engine: Engine, bundle: Bundle, codes: np.ndarray, *chunks: int) -> np.ndarray:
    stream = CodecDecoder(engine, bundle.manifest.codec).stream()
    parts = np.split(codes, np.cumsum(chunks)[:-1], axis=1) if chunks else [codes]
    return np.concatenate([*(stream.push(part) for part in parts), stream.flush()])


def random_codes(bundle: Bundle, frames: int, seed: int) -> np.ndarray:
    sizes = np.array(bundle.manifest.codec.codebook_sizes)[:, None]
    return np.random.default_rng(seed).integers(0, sizes, (len(sizes), frames))


def test_all_blocks_but_the_last_are_in_integers(bundle: Bundle, s2_model: GoldenModel) -> None:
    graph = onnx.load(bundle.file(FILE), load_external_data=False).graph
    blocks = len(s2_model.codec.config.decoder_rates)
    integers = [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    report, (form,) = report_of(bundle), bundle.manifest.graphs["codec_decode"].forms
    assert len(integers) == report.convolutions == form.convolutions["integers"] == 7 * (blocks - 1)
    assert form.convolutions == {"integers": 7 * (blocks - 1), "product": 4, "tiles": 3, "shifts": 1}


def test_the_transformer_is_in_8_bits(bundle: Bundle) -> None:
    """Of each layer five products, and two of each block behind it."""
    graph = onnx.load(bundle.file(FILE), load_external_data=False).graph
    widened = [node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"]
    assert len(widened) == len(set(widened)) > 5
    assert bundle.manifest.graphs["codec_decode"].forms[0].spec.rounds_activations


def test_floats_are_those_of_the_portable_graph(bundle: Bundle) -> None:
    """They stay in its file, and are not stored again."""
    graph = onnx.load(bundle.file(FILE), load_external_data=False).graph
    places = {t.name: {e.key: e.value for e in t.external_data}["location"] for t in graph.initializer if t.external_data}
    assert set(places.values()) == {"codec_decode.onnx.data", f"{FILE}.data"}
    assert all((place == f"{FILE}.data") == name.startswith(("int8.", "rows.")) for name, place in places.items())


@pytest.mark.usefixtures("vnni")
def test_the_sound_is_as_near_as_the_report_says(exact: Bundle, tiny_bundle: Bundle) -> None:
    """On every CPU: the report is not measured with saturating products."""
    report = report_of(exact)
    assert 20 < report.least_snr_db <= report.snr_db < 60
    ratios = []
    for seed in range(4):
        codes = random_codes(exact, 80, seed)
        ratios.append(signal_over_error(*(decoded(engine_of(b), b, codes) for b in (tiny_bundle, exact))))
    assert np.mean(ratios) == pytest.approx(report.snr_db, abs=1.5)


@pytest.mark.skipif("vnni" not in machine.features("cpu"), reason="products of uint8 and int8 saturate on a CPU without VNNI")
def test_exact_products_are_those_of_vnni(bundle: Bundle, exact: Bundle) -> None:
    codes = random_codes(bundle, 40, 9)
    np.testing.assert_array_equal(*(decoded(engine_of(b), b, codes) for b in (bundle, exact)))


def test_products_are_exact(tmp_path: Path) -> None:
    """Products of the largest numbers, whose sum of two does not fit into 16 bits."""
    inputs = {"weight": np.full((64, 8), 127, np.int8), "scale": np.float32(1), "scales": np.ones(8, np.float32)}
    inputs |= {"zero": np.uint8(0), "zeros": np.zeros(8, np.int8)}
    node = onnx.helper.make_node("MatMulIntegerToFloat", ["x", *inputs], ["y"], "product", domain="com.microsoft")
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, (4, 64))
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (4, 8))
    values = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in inputs.items()]
    graph = onnx.helper.make_graph([node], "product", [x], [y], values)
    opsets = [onnx.helper.make_opsetid("", 24), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))
    int8.make_exact(model)
    ir.save(model, tmp_path / "product.onnx")
    spec = GraphSpec("product.onnx", (TensorSpec("x", "uint8", (4, 64)),), (TensorSpec("y", "float32", (4, 8)),))
    made = open_engine(tmp_path / "product.onnx", spec, provider="cpu").run({"x": np.full((4, 64), 255, np.uint8)})["y"]
    np.testing.assert_array_equal(made, np.full((4, 8), 64 * 255 * 127))


@pytest.mark.usefixtures("vnni")
def test_any_chunks_give_the_same_bits(exact: Bundle) -> None:
    codes, engine = random_codes(exact, 40, 9), engine_of(exact)
    whole = decoded(engine, exact, codes)
    for chunks in ((4, 16, 16, 4), (1, 2, 30, 7), (1,) * 40):
        np.testing.assert_array_equal(whole, decoded(engine, exact, codes, *chunks))


@pytest.mark.usefixtures("vnni")
def test_it_is_used_on_a_cpu_that_is_made_for_it(bundle: Bundle, tiny_bundle: Bundle) -> None:
    assert engine_of(bundle).spec.file == FILE
    assert engine_of(tiny_bundle).spec.file == "codec_decode.onnx"
    assert BundleGraphs(bundle, "cpu", 1)["codec_encode"].spec.file == "codec_encode.onnx"


def test_elsewhere_the_codec_runs_in_float_and_says_so(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(machine, "cpu_features", lambda: ["avx2", "avx512f"])
    with caplog.at_level(logging.INFO, "fishrt"):
        assert engine_of(bundle).spec.file == "codec_decode.onnx"
    assert "codec_decode_int8.onnx is not used: this machine has no vnni" in caplog.text


@pytest.mark.slow
def test_the_exporter_adds_it(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def form(*arguments: Any) -> Form:
        asked.append(arguments[:4])
        return Form("cpu", arguments[1])

    monkeypatch.setattr("fishrt_export.export.int8_form", form)
    made = export_bundle(checkpoint, tmp_path / "out", Options(codec_int8=True))
    ((folder, spec, sizes, hop),) = asked
    assert folder.parent == tmp_path
    codec = made.manifest.codec
    assert (spec, sizes, hop) == (replace(made.manifest.specs["codec_decode"], identity=""), codec.codebook_sizes, codec.hop)


def test_another_kind_of_codec_is_refused() -> None:
    with pytest.raises(ExportError, match="--codec-int8 is not for a codec of the kind 'firefly'"):
        int8.check_codec("firefly")


def test_what_gives_something_else_is_refused(tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))
    calibrated, few = int8._calibrated, int8.CALIBRATION_FRAMES // 16
    monkeypatch.setattr(int8, "CALIBRATION_FRAMES", few)
    monkeypatch.setattr(int8, "_calibrated", lambda *arguments: dict.fromkeys(calibrated(*arguments), Range(-1e-3, 1e-3)))
    codec = tiny_bundle.manifest.codec
    with pytest.raises(ExportError, match=r"the codec in 8 bits has -?\d+\.\d dB between signal and error"):
        int8.int8_form(folder, tiny_bundle.manifest.specs["codec_decode"], codec.codebook_sizes, codec.hop)


def test_a_decoder_of_other_layers_is_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Its squares are written in another way, so that none is known as a Snake's."""
    folder, spec = Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle")), tiny_bundle.manifest.specs["codec_decode"]
    model = ir.load(folder / spec.file)
    for power in [node for node in model.graph if node.op_type == "Pow"]:
        square = ir.node("Mul", [power.inputs[0]] * 2)
        ir.convenience.replace_nodes_and_values(model.graph, power, [power], [square], power.outputs, square.outputs)
    ir.save(model, folder / spec.file)
    codec = tiny_bundle.manifest.codec
    with pytest.raises(ExportError, match="no layers of a form that 8 bits are known for"):
        int8.int8_form(folder, spec, codec.codebook_sizes, codec.hop)
