"""`fishrt export --codec-int8`: an additional form of the codec's decoder with most products in integers of 8 bits.

    rows, float ─► QuantizeLinear ─► MatMulIntegerToFloat ─► rows, float

They are the products of all blocks of a DAC's decoder except the last, where rounding would be audible noise in pauses, and those
of the transformer before it. Weights are symmetric with one scale for each output, or in the transformer for each block of
inputs. What a decoder's layer reads has one scale for the whole tensor. Its range is the range of the float form for random
codes, so that no recordings are needed.

The report's figures come from exact products, on a CPU without VNNI too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from fishrt.bundle.manifest import Form, Rounding
from fishrt.metrics import signal_over_error
from fishrt.progress import PartDone
from fishrt_engines import Engine, open_engine
from fishrt_engines.engine import GraphSpec, TensorSpec

from ...errors import ExportError
from ..attention import fast_operators
from ..edit import constant, is_constant, load, numbers, producer, save, tidy
from .decoder import by_rows, stored
from .rows import Range

CALL_FRAMES = 16
CALIBRATION_FRAMES = 128 * CALL_FRAMES
"""Random frames for the ranges. A few hundred frames miss extremes of speech."""
TEST_FRAMES = 16 * CALL_FRAMES
LEAST_SNR = 10.0
"""Least signal-to-error ratio in dB that rounding explains, even in a decoder of random weights, where it is largest."""
BLOCK = 128
"""Inputs that share a scale in a product of the transformer."""

_ENDS = ("ReduceMin", "ReduceMax")

Floats = npt.NDArray[np.float32]


def check_codec(kind: str) -> None:
    """Check the kind of the codec. Raises ExportError for one whose loss of quality in 8 bits was not measured."""
    if kind != "dac":
        raise ExportError(
            f"--codec-int8 is not for a codec of the kind {kind!r}: its loss of quality was measured for DACs only",
            hint="leave --codec-int8 out",
        )


def int8_form(folder: Path, portable: GraphSpec, sizes: tuple[int, ...], hop: int, progress: PartDone = lambda _: None) -> Form:
    """Write the graph into a bundle's folder, and return the form.

    portable: the spec of codec_decode. sizes: the entries of each codebook. hop: samples of a frame. Raises ExportError for a
    decoder without such layers, and for one that loses more than rounding explains.
    """
    rng = np.random.default_rng(0)
    ranges = _calibrated(folder, portable, hop, _codes(rng, sizes, CALIBRATION_FRAMES), progress)
    model = load(folder / portable.file)
    made = by_rows(model, hop, ranges)
    _quantise_transformer(model.graph)
    spec = replace(portable, file=f"{Path(portable.file).stem}_int8.onnx", columns=fast_operators(model), rounds_activations=True)
    save(model, folder / spec.file)
    ratios = _measured(folder, portable, spec, model, _codes(rng, sizes, TEST_FRAMES))
    if min(ratios) < LEAST_SNR:
        raise ExportError(
            f"the codec in 8 bits has {min(ratios):.1f} dB between signal and error; at least {LEAST_SNR:g} dB are expected",
            hint="leave --codec-int8 out",
        )
    progress(1.0)
    rounding = Rounding(len(ranges), CALIBRATION_FRAMES, float(np.mean(ratios)), min(ratios))
    return Form("cpu", spec, needs=("vnni",), rounding=rounding, convolutions=made.ways)


def _codes(rng: np.random.Generator, sizes: tuple[int, ...], frames: int) -> list[npt.NDArray[np.int64]]:
    """Return random codes int64 [1, codebooks, frames] in streams of eight calls each."""
    shape = (1, len(sizes), 8 * CALL_FRAMES)
    return [rng.integers(0, np.array(sizes)[:, None], shape) for _ in range(frames // shape[-1])]


def _calls(codes: npt.NDArray[np.int64]) -> Iterator[dict[str, npt.NDArray[np.int64]]]:
    for start in range(0, codes.shape[-1], CALL_FRAMES):
        positions = np.arange(start, start + CALL_FRAMES)[None]
        yield {"codes": np.ascontiguousarray(codes[..., start : start + CALL_FRAMES]), "position_ids": positions}


def _decoded(engine: Engine, codes: npt.NDArray[np.int64]) -> Floats:
    state = engine.new_state(batch=1)
    return np.concatenate([engine.run(feeds, state)["audio"].copy() for feeds in _calls(codes)], axis=-1)


def _calibrated(
    folder: Path, portable: GraphSpec, hop: int, streams: list[npt.NDArray[np.int64]], progress: PartDone
) -> Mapping[str, Range]:
    """Return the ranges of what the layers of the float form read, by their names. Raises ExportError if none has rows."""
    model = load(folder / portable.file)
    inner, outputs = by_rows(model, hop).inner, []
    if not inner:
        raise ExportError("the codec's decoder has no layers of a form that 8 bits are known for", hint="leave --codec-int8 out")
    tape = ir.tape.Tape()
    for read in inner:
        scale = constant(model.graph, f"{read.name}.scale", np.ones(1) if read.scale is None else read.scale, np.float32)
        rows = tape.op("Mul", [read.rows, scale])
        for operator in _ENDS:
            value = ir.Value(name=f"{read.name}.{operator}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(()))
            tape.op(operator, [rows], {"keepdims": 0}, output=value)
            model.graph.outputs.append(value)
            outputs.append(TensorSpec(str(value.name), "float32", ()))
    model.graph.extend(tape.nodes)
    spec = replace(portable, file=f"{Path(portable.file).stem}_ranges.onnx", outputs=(*portable.outputs, *outputs))
    found = {read.name: (0.0, 0.0) for read in inner}
    with _opened(model, folder, spec) as engine:
        for n, codes in enumerate(streams):
            progress(0.8 * n / len(streams))
            state = engine.new_state(batch=1)
            for feeds in _calls(codes):
                results = engine.run(feeds, state)
                for name, (low, high) in found.items():
                    least, most = (float(results[f"{name}.{operator}"]) for operator in _ENDS)
                    found[name] = min(low, least), max(high, most)
    return {name: Range(*ends) for name, ends in found.items()}


def _measured(
    folder: Path, portable: GraphSpec, spec: GraphSpec, model: ir.Model, streams: list[npt.NDArray[np.int64]]
) -> list[float]:
    """Return the ratio of the portable graph's signal to the error of `model`, in dB, for each stream. Changes `model`."""
    make_exact(model)
    exact = replace(spec, file=f"{Path(portable.file).stem}_exact.onnx")
    with _opened(model, folder, exact) as engine:
        engines = [open_engine(folder / portable.file, portable, provider="cpu"), engine]
        return [signal_over_error(*(_decoded(engine, codes) for engine in engines)) for codes in streams]


@contextmanager
def _opened(model: ir.Model, folder: Path, spec: GraphSpec) -> Iterator[Engine]:
    """Yield an engine of a graph whose files are removed afterwards."""
    save(model, folder / spec.file)
    try:
        yield open_engine(folder / spec.file, spec, provider="cpu")
    finally:
        for name in (spec.file, f"{spec.file}.data"):
            (folder / name).unlink(missing_ok=True)


def make_exact(model: ir.Model) -> None:
    """Give the decoder's integer weights a form that every CPU multiplies exactly: uint8 with the zero point 128.

    The results are those of a CPU with VNNI. Other x86 CPUs add two products of uint8 and int8 in 16 bits, which saturate; ONNX
    Runtime adds products of uint8 and uint8 in 32 bits everywhere.
    """
    for node in model.graph:
        if node.op_type == "MatMulIntegerToFloat":
            for position in (1, 5):  # the weight and its zero points
                old = node.inputs[position]
                assert old is not None
                node.replace_input_with(
                    position, constant(model.graph, f"{old.name}.exact", numbers(old).astype(np.int16) + 128, np.uint8)
                )
    tidy(model)


def _quantise_transformer(graph: ir.Graph) -> None:
    """Store the weights of linear layers in 8 bits, in the form that ONNX Runtime multiplies by in integers."""
    for node in list(graph):
        turned = producer(node.inputs[1], "Transpose") if node.op_type == "MatMul" else None
        if turned is None or not is_constant(turned.inputs[0]):
            continue
        weight = stored(turned.inputs[0]).T  # [inputs, outputs]
        inputs, outputs = weight.shape
        if inputs % BLOCK:
            continue
        blocks = weight.reshape(-1, BLOCK, outputs)
        scales = np.maximum(np.abs(blocks).max(axis=1, keepdims=True) / 127, 1e-12)
        name = f"int8.{turned.outputs[0].name}"
        parts = [
            constant(graph, name, np.round(blocks / scales).reshape(weight.shape), np.int8),
            constant(graph, f"{name}.scales", scales[:, 0], np.float32),
        ]
        widen = ir.node("DequantizeLinear", parts, {"axis": 0, "block_size": BLOCK})
        graph.insert_before(node, widen)
        node.replace_input_with(1, widen.outputs[0])
    # `fast_operators` removes what is left of the floats
