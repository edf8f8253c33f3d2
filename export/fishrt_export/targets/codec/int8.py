"""`fishrt export --codec-int8`: an additional graph of the codec's decoder with most convolutions in integers of 8 bits.

    float ─► QuantizeLinear ─► QLinearConv ─► DequantizeLinear ─► float

They are the convolutions of all blocks of a DAC's decoder except the last, where rounding would be audible noise in pauses.
Weights are symmetric with one scale for each output; activations have one scale for each tensor. Its range is the range of the
float graph for random codes, so that no recordings are needed. ONNX has no transposed convolution of integers. It becomes a
convolution over two inputs with `stride` outputs for each of its own, which are then interleaved.

The weights that stay float are read from the portable graph's data file. The report's figures come from exact products, on a CPU
without VNNI too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from ..edit import constant, load, numbers, only_reader, save, tidy

CALL_FRAMES = 16
CALIBRATION_FRAMES = 128 * CALL_FRAMES
"""Random frames for the ranges. A few hundred frames miss extremes of speech."""
TEST_FRAMES = 16 * CALL_FRAMES
LEAST_SNR = 10.0
"""Least signal-to-error ratio in dB that rounding explains, even in a decoder of random weights, where it is largest."""
_WEIGHT = re.compile(r"(?:.*\.)?decoder\.model\.(\d+)\.block\..*conv\.weight")
"""Name of a convolution's weight in one of the decoder's blocks, which are numbered from 1."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Range:
    """Range of an activation; it includes 0."""

    low: float
    high: float

    @property
    def scale(self) -> float:
        return max((self.high - self.low) / 255, 1e-8)

    @property
    def zero_point(self) -> int:
        return min(max(round(-self.low / self.scale), 0), 255)


@dataclass(frozen=True, slots=True)
class _Convolution:
    """A node to be replaced, and the Slice after it if it is a transposed convolution."""

    node: ir.Node
    trimmed: ir.Node | None

    @property
    def read(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def made(self) -> ir.Value:
        return (self.trimmed or self.node).outputs[0]


def check_codec(kind: str) -> None:
    """Check the kind of the codec. Raises ExportError for one whose loss of quality in 8 bits was not measured."""
    if kind != "dac":
        raise ExportError(
            f"--codec-int8 is not for a codec of the kind {kind!r}: its loss of quality was measured for DACs only",
            hint="leave --codec-int8 out",
        )


def int8_form(folder: Path, portable: GraphSpec, sizes: tuple[int, ...], progress: PartDone = lambda _: None) -> Form:
    """Write the graph into a bundle's folder, and return the form.

    portable: the spec of codec_decode. sizes: the entries of each codebook. Raises ExportError for a decoder without such
    convolutions, and for one that loses more than rounding explains.
    """
    rng = np.random.default_rng(0)
    model = load(folder / portable.file)
    found = list(_convolutions(model.graph))
    if not found:
        raise ExportError("the codec's decoder has no blocks that could run in 8 bits", hint="leave --codec-int8 out")
    ranges = _calibrated(folder, portable, found, _codes(rng, sizes, CALIBRATION_FRAMES), progress)
    made = replace(portable, file=f"{Path(portable.file).stem}_int8.onnx")
    for n, convolution in enumerate(found):
        _replace(model.graph, convolution, ranges, n)
    made = replace(made, columns=fast_operators(model))
    save(model, folder / made.file)
    ratios = _measured(folder, portable, model, _codes(rng, sizes, TEST_FRAMES))
    if min(ratios) < LEAST_SNR:
        raise ExportError(
            f"the codec in 8 bits has {min(ratios):.1f} dB between signal and error; at least {LEAST_SNR:g} dB are expected",
            hint="leave --codec-int8 out",
        )
    progress(1.0)
    rounding = Rounding(len(found), CALIBRATION_FRAMES, float(np.mean(ratios)), min(ratios))
    return Form("cpu", made, needs=("vnni",), rounding=rounding)


def _convolutions(graph: ir.Graph) -> Iterator[_Convolution]:
    of_block: dict[int, list[_Convolution]] = {}
    for node in graph:
        if node.op_type not in ("Conv", "ConvTranspose") or not (match := _WEIGHT.fullmatch(_source(node.inputs[1]).name or "")):
            continue
        trimmed = only_reader(node.outputs[0], "Slice") if node.op_type == "ConvTranspose" else None
        assert trimmed is not None or node.op_type == "Conv"
        of_block.setdefault(int(match[1]), []).append(_Convolution(node, trimmed))
    for block in sorted(of_block)[:-1]:
        yield from of_block[block]


def _source(value: ir.Value | None) -> ir.Value:
    """Return the stored weight of a value: the input of its cast to float, or the value itself."""
    assert value is not None
    producer = value.producer()
    return value if producer is None else _source(producer.inputs[0])


def _weight(value: ir.Value | None) -> Floats:
    return numbers(_source(value)).astype(np.float32)


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
    folder: Path, portable: GraphSpec, found: list[_Convolution], streams: list[npt.NDArray[np.int64]], progress: PartDone
) -> Mapping[str, _Range]:
    """Return the ranges of the convolutions' inputs and outputs by name."""
    wanted = sorted({str(value.name) for c in found for value in (c.read, c.made)})
    model = load(folder / portable.file)
    by_name = {value.name: value for node in model.graph for value in node.outputs}
    outputs = []
    for operator in ("ReduceMin", "ReduceMax"):
        for name in wanted:
            value = ir.Value(name=f"{name}.{operator}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(()))
            model.graph.append(ir.node(operator, [by_name[name]], attributes={"keepdims": 0}, outputs=[value]))
            model.graph.outputs.append(value)
            outputs.append(TensorSpec(str(value.name), "float32", ()))
    spec = replace(portable, file=f"{Path(portable.file).stem}_ranges.onnx", outputs=(*portable.outputs, *outputs))
    lows, highs = dict.fromkeys(wanted, 0.0), dict.fromkeys(wanted, 0.0)
    with _opened(model, folder, spec) as engine:
        for n, codes in enumerate(streams):
            progress(0.8 * n / len(streams))
            state = engine.new_state(batch=1)
            for feeds in _calls(codes):
                results = engine.run(feeds, state)
                for name in wanted:
                    lows[name] = min(lows[name], float(results[f"{name}.ReduceMin"]))
                    highs[name] = max(highs[name], float(results[f"{name}.ReduceMax"]))
    return {name: _Range(lows[name], highs[name]) for name in wanted}


def _measured(folder: Path, portable: GraphSpec, model: ir.Model, streams: list[npt.NDArray[np.int64]]) -> list[float]:
    """Return the ratio of the portable graph's signal to the error of `model`, in dB, for each stream. Changes `model`."""
    make_exact(model)
    spec = replace(portable, file=f"{Path(portable.file).stem}_exact.onnx")
    with _opened(model, folder, spec) as exact:
        engines = [open_engine(folder / portable.file, portable, provider="cpu"), exact]
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
    """Give the integer weights a form that every CPU multiplies exactly: uint8 with the zero point 128.

    The results are those of a CPU with VNNI. Other x86 CPUs add two products of uint8 and int8 in 16 bits, which saturate; ONNX
    Runtime adds products of uint8 and uint8 in 32 bits everywhere.
    """
    for node in model.graph:
        if node.op_type == "QLinearConv":
            for position in (3, 5):  # the weight and its zero points
                array = _weight(node.inputs[position]) + 128
                node.replace_input_with(position, constant(model.graph, f"{node.name}.exact.{position}", array, np.uint8))
    tidy(model)


def _replace(graph: ir.Graph, convolution: _Convolution, ranges: Mapping[str, _Range], number: int) -> None:
    node = convolution.node
    weight, bias, stride = _weight(node.inputs[1]), _weight(node.inputs[2]), 1
    dilation = node.attributes.get_ints("dilations", [1])[0]
    if convolution.trimmed is not None:
        weight, stride = _of_two(weight, node.attributes.get_ints("strides", [1])[0])
        bias = np.repeat(bias, stride)
    read, made = ranges[str(convolution.read.name)], ranges[str(convolution.made.name)]
    scales = np.maximum(np.abs(weight).max((1, 2)) / 127, 1e-12).astype(np.float32)
    integers = np.clip(np.round(weight / scales[:, None, None]), -127, 127)

    def stored(name: str, array: npt.ArrayLike, dtype: type[np.generic]) -> ir.Value:
        return constant(graph, f"int8.{number}.{name}", array, dtype)

    def of(name: str, found: _Range) -> list[ir.Value]:
        return [stored(f"{name}.scale", found.scale, np.float32), stored(f"{name}.zero", found.zero_point, np.uint8)]

    tape = ir.tape.Tape()
    reads, makes = of("read", read), of("made", made)
    x = tape.op("QuantizeLinear", [convolution.read, *reads])
    whole = np.clip(np.round(bias / (scales * read.scale)), -(2**31), 2**31 - 1)
    y = tape.op(
        "QLinearConv",
        [
            x,
            *reads,
            stored("weight", integers, np.int8),
            stored("scales", scales, np.float32),
            stored("zeros", np.zeros(len(scales)), np.int8),
            *makes,
            stored("bias", whole, np.int32),
        ],
        attributes={"dilations": [dilation], "kernel_shape": [weight.shape[2]]},
    )
    if stride > 1:
        outputs = len(scales) // stride
        y = tape.op("Reshape", [y, stored("parts", [0, outputs, stride, -1], np.int64)])
        y = tape.op("Transpose", [y], attributes={"perm": [0, 1, 3, 2]})
        y = tape.op("Reshape", [y, stored("joined", [0, outputs, -1], np.int64)])
    y = tape.op("DequantizeLinear", [y, *makes])
    ir.convenience.replace_nodes_and_values(graph, node, [], tape.nodes, [convolution.made], [y])


def _of_two(weight: Floats, stride: int) -> tuple[Floats, int]:
    """Return the weight [in, out, 2·stride] of a transposed convolution as that of a convolution, [out·stride, in, 2].

    It reads the input before and the input itself.
    """
    inputs, outputs, kernel = weight.shape
    assert kernel == 2 * stride
    pairs = np.stack([weight[:, :, stride:], weight[:, :, :stride]], axis=-1)
    return np.ascontiguousarray(pairs.transpose(1, 2, 0, 3)).reshape(outputs * stride, inputs, 2), stride
