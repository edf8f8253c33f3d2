"""The codec's decoder on rows: its graph, its error, and streams that give the bits of the whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch", reason="needs the export extra")

import torch

from fishrt.bundle.manifest import Form
from fishrt.metrics import signal_over_error
from fishrt_engines import Engine, open_engine
from fishrt_engines.engine import GraphSpec
from fishrt_export.models.codec.dac import Dac
from fishrt_export.sources.codec import AUDIO_TOLERANCE
from fishrt_export.targets.codec import decoder
from fishrt_export.targets.codec.decoder import way
from fishrt_export.targets.codec.winograd import transforms
from fishrt_export.targets.forms import make_forms
from tiny import GoldenModel
from tolerances import TOLERANCES

pytestmark = pytest.mark.slow
CHUNKS = ((1,) * 40, (3,) * 13 + (1,), (5,) * 8, (2, 7, 31), (16, 16, 8))


@dataclass(frozen=True)
class Made:
    """A form, and engines of the portable graph and of the form."""

    folder: Path
    form: Form
    portable: Engine
    engine: Engine


@pytest.fixture(scope="module")
def made(s2_model: GoldenModel, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The portable graph and its form, with all layers on rows: those of a tiny codec have few channels."""
    folder = tmp_path_factory.mktemp("rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "LEAST_CHANNELS", 1)
        return make(s2_model, folder)


def make(model: GoldenModel, folder: Path, change: Callable[[ir.Graph], None] = lambda _: None) -> Made:
    """Make the form of a copy of the portable graph, which `change` changes first."""
    path = model.file("codec_decode")
    for file in (path, path.with_name(f"{path.name}.data")):
        shutil.copy(file, folder / file.name)
    graph = ir.load(folder / path.name)
    change(graph.graph)
    ir.save(graph, folder / path.name)
    spec = decode_spec_of(model)
    (form,) = make_forms(folder, "codec_decode", spec, ["cpu"], hop=model.codec.config.hop)
    return Made(folder, form, *(open_engine(folder / s.file, s, provider="cpu") for s in (spec, form.spec)))


def decode_spec_of(model: GoldenModel) -> GraphSpec:
    """Return the spec of the portable decoder."""
    return next(job.spec for job in model.codec.jobs() if job.role == "codec_decode")


@pytest.fixture
def engine(made: Made) -> Engine:
    return made.engine


@pytest.fixture(scope="module")
def codes(s2_model: GoldenModel) -> np.ndarray:
    """Three rows of 40 frames."""
    sizes = np.array(s2_model.codec.config.codebook_sizes)[:, None]
    return np.random.default_rng(3).integers(0, sizes, (3, len(sizes), 40))


def decoded(engine: Engine, codes: np.ndarray, *chunks: int) -> np.ndarray:
    """Return the audio [batch, samples] of a stream in chunks, of one call without."""
    state, heard, start = engine.new_state(batch=len(codes)), [], 0
    for frames in chunks or (codes.shape[2],):
        positions = np.tile(np.arange(start, start + frames), (len(codes), 1))
        part = np.ascontiguousarray(codes[..., start : start + frames])
        heard.append(engine.run({"codes": part, "position_ids": positions}, state)["audio"][:, 0].copy())
        start += frames
    return np.concatenate(heard, axis=1)


@pytest.mark.parametrize("taps", [3, 7])
def test_minimal_filtering_is_a_convolution(taps: int) -> None:
    a, g, b = transforms(4, taps)
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal(taps + 3), rng.standard_normal(taps)
    np.testing.assert_allclose(a @ ((g @ w) * (b @ x)), np.correlate(x, w), rtol=0, atol=1e-12)
    assert 0.5 <= np.abs(b).max(axis=1).min() <= np.abs(b).max() <= 2


def test_the_form_says_how_it_computes(made: Made) -> None:
    """Of each block, 3 · 2 convolutions and the one before them; and the last."""
    assert made.form.spec.file == "codec_decode_cpu.onnx"
    graph = ir.load(made.folder / made.form.spec.file).graph
    assert not [node for node in graph if node.op_type in ("ConvTranspose", "Sin")]
    blocks = len([node for node in ir.load(made.folder / "codec_decode.onnx").graph if node.op_type == "ConvTranspose"])
    assert made.form.convolutions == {"product": 4 * blocks, "tiles": 3 * blocks, "shifts": 1}


@pytest.mark.parametrize("length", [32, 256, 1024, 2048])
@pytest.mark.parametrize("dilation", [1, 3, 9])
def test_all_wide_layers_of_the_official_decoder_are_in_tiles(length: int, dilation: int) -> None:
    assert way(7, dilation, length, 96) == "tiles"
    assert way(1, dilation, length, 96) == "product"
    assert way(7, dilation, length, 1) == "shifts"


def test_tiles_that_reach_far_beyond_a_frame_are_none() -> None:
    assert way(7, 9, 8, 96) == "shifts"


def test_a_narrow_decoder_has_no_form(s2_model: GoldenModel) -> None:
    path, spec = s2_model.file("codec_decode"), decode_spec_of(s2_model)
    assert make_forms(path.parent, "codec_decode", spec, ["cpu"], hop=s2_model.codec.config.hop) == []


def test_it_is_near_to_float64(s2_model: GoldenModel, engine: Engine, codes: np.ndarray) -> None:
    dac = s2_model.codec.module()
    assert isinstance(dac, Dac)
    with torch.no_grad():
        features = dac.quantizer.dequantize(torch.from_numpy(codes))
        exact = dac.double().decoder(dac.quantizer.spread(features.double()))[:, 0].numpy()
    assert signal_over_error(exact, decoded(engine, codes)) >= 90
    assert np.abs(exact - decoded(engine, codes)).max() <= TOLERANCES["prefix"]


@pytest.mark.parametrize("chunks", CHUNKS, ids=lambda chunks: f"{chunks[0]}-{chunks[-1]}")
def test_a_stream_gives_the_bits_of_the_whole(engine: Engine, codes: np.ndarray, chunks: tuple[int, ...]) -> None:
    np.testing.assert_array_equal(decoded(engine, codes, *chunks), decoded(engine, codes))


def test_rows_of_a_batch_are_their_own(engine: Engine, codes: np.ndarray) -> None:
    together = decoded(engine, codes, 7, 33)
    for row in range(len(codes)):
        np.testing.assert_array_equal(decoded(engine, codes[row : row + 1])[0], together[row])


@pytest.mark.parametrize("alpha", [1e-6, 0.009, 0.011, -0.3])
def test_a_channel_that_hardly_bends(
    s2_model: GoldenModel, codes: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alpha: float
) -> None:
    """One channel of some Snakes has another α: before convolutions of 7 taps and of 1, transposed ones and the last."""

    def change(graph: ir.Graph) -> None:
        ends = ("1.block.0.alpha", "2.block.2.block.0.alpha", "2.block.3.block.2.alpha", "5.alpha")
        names = [name for name in graph.initializers if name.endswith(ends) and "decoder" in name]
        assert len(names) == len(ends)
        for name in names:
            value = graph.initializers[name]
            assert value.const_value is not None
            numbers = value.const_value.numpy().copy()
            numbers[0, 0] = alpha
            value.const_value = ir.tensor(numbers, name=name)

    monkeypatch.setattr(decoder, "LEAST_CHANNELS", 1)
    made = make(s2_model, tmp_path, change)
    sines = [node for node in ir.load(tmp_path / made.form.spec.file).graph if node.op_type == "Sin"]
    assert len(sines) == (4 if abs(alpha) < decoder.LEAST_ALPHA else 0)
    found = decoded(made.engine, codes, 5, 35)
    np.testing.assert_allclose(found, decoded(made.portable, codes), rtol=0, atol=AUDIO_TOLERANCE)  # measured: 1.3e-5
    np.testing.assert_array_equal(found, decoded(made.engine, codes))


def test_a_layer_of_another_form_stays(
    s2_model: GoldenModel, codes: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A convolution follows a Snake that is written in another way."""

    def change(graph: ir.Graph) -> None:
        power = [node for node in graph if node.op_type == "Pow"][3]
        square = ir.node("Mul", [power.inputs[0]] * 2)
        ir.convenience.replace_nodes_and_values(graph, power, [power], [square], power.outputs, square.outputs)

    monkeypatch.setattr(decoder, "LEAST_CHANNELS", 1)
    made = make(s2_model, tmp_path, change)
    np.testing.assert_allclose(
        decoded(made.engine, codes, 5, 35), decoded(made.portable, codes), rtol=0, atol=TOLERANCES["prefix"]
    )
