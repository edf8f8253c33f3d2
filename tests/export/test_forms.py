"""Forms of weights are recognised by keys and types, described, and refused with one sentence; hostile files are errors."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from fishrt.cli import main
from fishrt_export.checkpoint.forms.describe import describe
from fishrt_export.checkpoint.forms.folder import Checkpoint
from fishrt_export.checkpoint.forms.recognise import recognise
from fishrt_export.checkpoint.forms.table import Entry, Table, read_table
from fishrt_export.errors import ExportError
from form_samples import CODEC, GOLDEN, HALVES, SAMPLES

NESTED = {"model_type": "fish_qwen3_omni", "text_config": {}, "audio_decoder_config": {}}
KNOWN = {
    "bnb-int8": ("bitsandbytes LLM.int8", 8, "rows"),
    "bnb-nf4": ("bitsandbytes NF4, nested scales", 4, "blocks of 64"),
    "fp8-per-row": ("FP8 (e4m3)", 8, "rows"),
    "gguf-audiocpp-q8_0": ("GGUF of audio.cpp, Q8_0", 8, "blocks of 32"),
    "gguf-s2cpp-q4_k": ("GGUF of s2.cpp, Q4_K, Q6_K", 4, "blocks of 16 or 32"),
    "gguf-s2cpp-q8_0": ("GGUF of s2.cpp, Q8_0", 8, "blocks of 32"),
    "gptq-act-order": ("GPTQ, act-order", 4, "groups of 32"),
    "mlx-4bit": ("MLX", 4, "groups of 64"),
    "mlx-8bit": ("MLX", 8, "groups of 64"),
    "upstream-int4": ("int4 of the original tools, in the tiles of NVIDIA cards", 4, "groups of 128"),
    "upstream-int8-s2": ("int8 of the original tools", 8, "rows"),
}


@pytest.mark.parametrize("form", KNOWN)
def test_a_sample_is_recognised(form: str) -> None:
    found = describe(SAMPLES / form)
    assert (found.form, found.bits, found.group) == KNOWN[form]
    assert found.family == "Fish Audio S2-Pro"
    lines = found.lines("1 MB")
    assert len(lines) <= 10
    assert "codec.pth of fishaudio/s2-pro, and give" in lines[-1] or form == "gguf-s2cpp-q8_0"


def table(*entries: tuple[str, str, tuple[int, ...]], **more: Any) -> Table:
    return Table({name: Entry(dtype, shape) for name, dtype, shape in entries}, **more)


LAYER = "layers.0.attention.wo"
REFUSED: dict[str, tuple[Table, dict[str, Any], str]] = {
    "torchao": (table(classes=frozenset({"torchao.dtypes.affine_quantized_tensor.AffineQuantizedTensor"})), {}, "torchao"),
    "NVFP4": (table((f"{LAYER}.weight", "U8", (8, 4)), (f"{LAYER}.weight_scale_2", "F32", ())), {}, "NVFP4"),
    "MXFP8": (table((f"{LAYER}.weight", "F8_E4M3", (8, 32)), (f"{LAYER}.weight_scale", "U8", (8, 1))), {}, "MXFP8"),
    "packed": (table((f"{LAYER}.weight_packed", "I32", (8, 4))), {}, "compressed-tensors with packed weights"),
    "compressed-tensors": (table(), {"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    "AWQ": (table((f"{LAYER}.qweight", "I32", (8, 4)), (f"{LAYER}.qzeros", "I32", (1, 4))), {}, "AWQ"),
    "AWQ by its config": (
        table((f"{LAYER}.qweight", "I32", (8, 4)), (f"{LAYER}.g_idx", "I32", (8,))),
        {"quantization_config": {"quant_method": "awq"}},
        "AWQ",
    ),
    "marlin": (
        table((f"{LAYER}.qweight", "I32", (8, 4)), (f"{LAYER}.g_idx", "I32", (64,))),
        {"quantization_config": {"quant_method": "gptq", "checkpoint_format": "marlin"}},
        "GPTQ in the layout 'marlin'",
    ),
    "exl3": (table(), {"quantization_config": {"quant_method": "exl3"}}, "quantised by exl3"),
    "3 bits": (
        table((f"{LAYER}.qweight", "I32", (6, 4)), (f"{LAYER}.g_idx", "I32", (64,)), (f"{LAYER}.scales", "F16", (2, 4))),
        {},
        "GPTQ of 3 bits",
    ),
    "a cast to FP8": (table((f"{LAYER}.weight", "F8_E4M3", (8, 8))), {}, "a cast to 8 bits without scales"),
    "e5m2": (table((f"{LAYER}.weight", "F8_E5M2", (8, 8)), (f"{LAYER}.weight_scale", "F32", ())), {}, "e5m2: a cast"),
    "squares": (
        table((f"{LAYER}.weight", "F8_E4M3", (8, 8)), (f"{LAYER}.weight_scale_inv", "F32", (1, 1))),
        {},
        "FP8 with a scale for each square",
    ),
    "mxfp4 of MLX": (
        table((f"{LAYER}.weight", "U32", (8, 4)), (f"{LAYER}.scales", "U8", (8, 1))),
        {"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}},
        "MLX mxfp4",
    ),
    "a namesake": (table((f"{LAYER}.weight", "U32", (8, 4))), {"model_type": "qwen3"}, "a model of the type 'qwen3'"),
}


@pytest.mark.parametrize(("found", "config", "message"), REFUSED.values(), ids=REFUSED)
def test_a_form_that_is_not_read(found: Table, config: dict[str, Any], message: str) -> None:
    form = recognise(found, NESTED | config)
    with pytest.raises(ExportError, match="cannot be exported: it is") as caught:
        form.check("it")
    assert message in str(caught.value)
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_what_is_read_has_no_refusal() -> None:
    llm_compressor = table((f"{LAYER}.weight", "F8_E4M3", (8, 8)), (f"{LAYER}.weight_scale", "F32", ()))
    form = recognise(llm_compressor, NESTED | {"quantization_config": {"quant_method": "compressed-tensors"}})
    assert (form.name, form.refused) == ("fp8", "")


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_inspect_tells_folder_and_file() -> None:
    sample = SAMPLES / "gptq-act-order"
    for path in (sample, sample / "model.safetensors"):
        done = run("inspect", path)
        assert done.exit_code == 0, done.output
        assert "GPTQ, act-order, 4 bits, groups of 32; made by gptqmodel:5.7.0" in done.output
        assert "Fish Audio Research License" in done.output
        assert len(done.output.splitlines()) <= 10
    assert json.loads(run("inspect", sample, "--json").output)["quantised"] == 9
    assert "is a checkpoint" in run("inspect", sample, "--verify").output
    refused = run("inspect", SAMPLES / "other-model-gguf")
    assert "refuses: another model, whatever its name" in refused.output
    assert "'qwen3'" in refused.output


def refusal(*args: object) -> str:
    done = run("export", *args)
    assert done.exit_code == 2, done.output
    return done.output


def test_what_is_missing_is_named_with_the_file_that_has_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = refusal(SAMPLES / "bnb-nf4", out)
    assert "lacks a tokenizer" in text
    assert "a codec (codec.pth" in text
    assert "take tokenizer.json and codec.pth of fishaudio/s2-pro, and give --tokenizer PATH and --codec PATH" in text
    text = refusal(SAMPLES / "bnb-nf4", out, "--tokenizer", HALVES["tokenizer"])
    assert "take codec.pth of fishaudio/s2-pro, and give --codec PATH" in text
    assert "architecture 'qwen3'" in refusal(SAMPLES / "other-model-gguf", out)
    assert "nowhere.pth does not exist" in refusal(SAMPLES / "bnb-nf4", out, "--weights", "nowhere.pth")
    (tmp_path / "text_model.safetensors").touch()
    assert "mlx-forge" in refusal(tmp_path, out)


def test_parts_are_given_by_file_or_folder() -> None:
    sample = SAMPLES / "mlx-4bit"
    for codec in (CODEC, CODEC / "codec.pth"):
        for tokenizer in (GOLDEN / "lm/checkpoint", GOLDEN / "lm/checkpoint/tokenizer.json"):
            found = Checkpoint.of(sample, codec=codec, tokenizer=tokenizer)
            assert found.codec_files().weights == CODEC / "codec.pth"
            assert found.codec_files().config is not None
            assert found.language_model().tokenizer == HALVES["tokenizer"]


def test_two_sets_of_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What the original quantiser leaves: the new weights beside the old ones, which every loader takes first."""
    shutil.copytree(GOLDEN / "lm/checkpoint", tmp_path, dirs_exist_ok=True)
    shutil.copy(SAMPLES / "upstream-int8-s2/model.pth", tmp_path)
    assert Checkpoint.of(tmp_path).language_model().form.name == "plain"
    assert "model.safetensors.index.json is taken, and not model.pth; --weights FILE chooses" in caplog.text
    assert describe(tmp_path).others == ("model.pth",)
    caplog.clear()
    for path, weights in ((tmp_path, Path("model.pth")), (tmp_path, tmp_path / "model.pth"), (tmp_path / "model.pth", None)):
        found = Checkpoint.of(path, weights=weights).language_model()
        assert (found.form.name, found.weights.name) == ("int8", "model.pth")
    assert not caplog.text


def test_a_gguf_in_two_files(tmp_path: Path) -> None:
    """Halves of one file, each with the values of the whole."""
    whole = SAMPLES / "gguf-s2cpp-q8_0"
    for half, keep in (("transformer", False), ("codec", True)):
        write_half(whole / "s2-pro-q8_0.gguf", tmp_path / f"s2-pro-{half}-only.gguf", codec=keep)
    shutil.copy(whole / "codec_config.json", tmp_path)
    found = Checkpoint.of(tmp_path, tokenizer=HALVES["tokenizer"])
    found.check()
    assert found.weights.name == "s2-pro-transformer-only.gguf"
    assert found.codec_files().weights.name == "s2-pro-codec-only.gguf"
    found = Checkpoint.of(tmp_path / "s2-pro-transformer-only.gguf", tokenizer=HALVES["tokenizer"])
    assert found.codec_files().weights.name == "s2-pro-codec-only.gguf"
    (tmp_path / "s2-pro-codec-only.gguf").unlink()
    with pytest.raises(ExportError, match="lacks a codec") as caught:
        Checkpoint.of(tmp_path, tokenizer=HALVES["tokenizer"]).check()
    assert "codec.pth of fishaudio/s2-pro" in str(caught.value.hint)


def write_half(source: Path, target: Path, *, codec: bool) -> None:
    """Write the tensors of one half, with the bytes of all: their places stay."""
    raw = source.read_bytes()
    header = Header(raw)
    kept = [info for name, info in header.infos if name.startswith("c.") == codec]
    head = raw[:8] + struct.pack("<QQ", len(kept), header.count) + raw[24 : header.values_end] + b"".join(kept)
    target.write_bytes(head.ljust(-(-len(head) // 32) * 32, b"\0") + raw[header.start :])


class Header:
    """Where the values and the tensors of a GGUF file end; texts, numbers of 4 bytes and truth values only."""

    def __init__(self, raw: bytes) -> None:
        tensors, self.count = struct.unpack_from("<QQ", raw, 8)
        at = 24
        sizes = {4: 4, 5: 4, 6: 4, 7: 1}
        for _ in range(self.count):
            at += 8 + struct.unpack_from("<Q", raw, at)[0]
            (kind,) = struct.unpack_from("<I", raw, at)
            at += 4 + (8 + struct.unpack_from("<Q", raw, at + 4)[0] if kind == 8 else sizes[kind])
        self.values_end, self.infos = at, list[tuple[str, bytes]]()
        for _ in range(tensors):
            begin = at
            (length,) = struct.unpack_from("<Q", raw, at)
            name = raw[at + 8 : at + 8 + length].decode()
            (dims,) = struct.unpack_from("<I", raw, at + 8 + length)
            at += 8 + length + 4 + 8 * dims + 4 + 8
            self.infos.append((name, raw[begin:at]))
        self.start = -(-at // 32) * 32


# ---- hostile files


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(tensors: bytes = b"", count: int = 0, values: bytes = b"", keys: int = 0, data: int = 4096) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, count, keys) + values + tensors + bytes(data)


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def safetensors(header: Any, data: int = 64) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(data)


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE: dict[str, bytes] = {
    "gguf: many tensors": gguf(count=1 << 60),
    "gguf: many values": gguf(keys=1 << 60),
    "gguf: a long name": gguf(struct.pack("<Q", 1 << 62), 1),
    "gguf: a long text": gguf(values=text("a") + struct.pack("<IQ", 8, 1 << 50), keys=1),
    "gguf: a long array": gguf(values=text("a") + struct.pack("<IIQ", 9, 0, 1 << 60), keys=1),
    "gguf: many texts": gguf(values=text("a") + struct.pack("<IIQ", 9, 8, 1 << 60), keys=1),
    "gguf: arrays of arrays": gguf(values=text("a") + struct.pack("<IIQ", 9, 9, 3), keys=1),
    "gguf: an unknown type of value": gguf(values=text("a") + struct.pack("<I", 77), keys=1),
    "gguf: many dimensions": gguf(text("a") + struct.pack("<I", 1 << 31), 1),
    "gguf: a vast tensor": gguf(tensor("a", (1 << 40, 1 << 40), 0, 0), 1),
    "gguf: a tensor beyond the end": gguf(tensor("a", (32,), 0, 1 << 40), 1),
    "gguf: lying blocks": gguf(tensor("a", (32, 1 << 20), 8, 0), 1),
    "gguf: half a block": gguf(tensor("a", (33,), 8, 0), 1),
    "gguf: overlapping tensors": gguf(tensor("a", (64,), 0, 0) + tensor("b", (64,), 0, 64), 2),
    "gguf: no alignment": gguf(values=text("general.alignment") + struct.pack("<II", 4, 0), keys=1),
    "gguf: cut off": b"GGUF\x03\x00\x00\x00",
    "gguf: version 9": struct.pack("<4sIQQ", b"GGUF", 9, 0, 0),
    "gguf: not UTF-8": gguf(values=struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", 4, 0), keys=1),
    "safetensors: a negative shape": safetensors({"a": entry([-1, 4], 0, 16)}),
    "safetensors: overlapping tensors": safetensors({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}),
    "safetensors: a place of another size": safetensors({"a": entry([4], 0, 12)}),
    "safetensors: beyond the end": safetensors({"a": entry([400], 0, 1600)}),
    "safetensors: a vast shape": safetensors({"a": entry([1 << 40, 1 << 40], 0, 16)}),
    "safetensors: a shape of truth values": safetensors({"a": entry([True, 4], 0, 16)}),  # type: ignore[list-item]
    "safetensors: deep": safetensors(b'{"a":' + b"[" * 100_000),
    "safetensors: no object": safetensors({"a": 3}),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / f"model.{'gguf' if content[:4] == b'GGUF' else 'safetensors'}"
    path.write_bytes(content)
    assert_refused(path)


def assert_refused(path: Path) -> None:
    """An error with the file's name, and no allocation beyond its size; Python's own objects aside."""
    tracemalloc.start()
    try:
        with pytest.raises(ExportError) as caught:
            read_table(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert path.name in str(caught.value)
    assert peak < 4 * path.stat().st_size + 300_000


def zipped(path: Path, program: bytes, method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", program)


class Run:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("run"),))


PROGRAMS = {
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "a mark that is not there": b"\x80\x02e.",
    "nothing on the stack": b"\x80\x02.",
    "a number that is not remembered": b"\x80\x02h\x07.",
    "an unknown instruction": b"\x80\x02\xff.",
    "a long text": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x0f.",
    "a long array": b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x0f.",
    "cut off": b"\x80\x02}",
    "half a pair": b"\x80\x02}(X\x01\x00\x00\x00au.",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_hostile_program(tmp_path: Path, program: bytes) -> None:
    path = tmp_path / "model.pth"
    zipped(path, program)
    if program == PROGRAMS["a list in itself"]:  # which is harmless: no tensors
        assert not read_table(path).entries
        return
    assert_refused(path)


def test_a_program_that_grows_when_it_is_unpacked(tmp_path: Path) -> None:
    zipped(tmp_path / "model.pth", b"\x80\x02" + b"N0" * (1 << 20) + b"N.", zipfile.ZIP_DEFLATED)
    assert_refused(tmp_path / "model.pth")


def test_no_code_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, write in (("zip.pth", zipped), ("plain.pth", Path.write_bytes)):
        write(tmp_path / name, pickle.dumps({"x": Run()}))
        found = read_table(tmp_path / name)
        assert not found.entries
        assert any("touch" in name or "pathlib" in name for name in found.classes)
    assert not (tmp_path / "run").exists()
