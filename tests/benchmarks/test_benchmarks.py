"""The tools in benchmarks/: synthetic checkpoints, the torch peer, records, plots and the table. No test asserts a time."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the export extra")

import torch

import table as tables
from fishrt.bench.setup import bench_prompt, bytes_read, open_timed
from fishrt.language_model.batch import DualAR
from fishrt.language_model.sampling import Sampling, SeededNoise
from fishrt.text.tokenizer import Tokenizer
from fishrt_export.sources.codec import open_codec
from fishrt_export.sources.language_model import open_language_model
from full_size import FAMILIES, write_checkpoint
from full_size.tokenizer import write_s2, write_special_tokens
from full_size.weights import LanguageModelWeights, language_model_shapes
from harness import compare
from helpers_lm import frames_of
from record import RESULTS, environment, write_record


@pytest.fixture(scope="module", params=FAMILIES)
def synthetic(request, tmp_path_factory) -> Path:
    return write_checkpoint(request.param, tmp_path_factory.mktemp("synthetic") / request.param, tiny=True)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_a_synthetic_checkpoint_is_a_checkpoint_of_its_family(synthetic):
    codec = open_codec(synthetic)
    source = open_language_model(synthetic, codec=codec.kind)
    assert source.family.name == synthetic.name
    assert [*source.problems(), *codec.problems()] == []


def test_its_weights_are_sane(synthetic):
    source = open_language_model(synthetic, codec=open_codec(synthetic).kind)
    for name in source.weights:
        tensor = source.weights[name]
        assert tensor.dtype == torch.bfloat16
        assert 0.01 < tensor.float().square().mean().sqrt() < 3, name


def test_its_codec_is_loud_and_not_clipped(synthetic):
    source = open_codec(synthetic)
    codes = torch.stack([torch.arange(20) * 37 % size for size in source.config.codebook_sizes])[None]
    with torch.inference_mode():
        audio = source.module().decode(codes)
    assert 1e-4 < audio.std() < 0.6
    assert (audio.abs() > 0.999).float().mean() < 0.01


def test_its_tokenizer_knows_english(synthetic, tmp_path):
    source = open_language_model(synthetic, codec=open_codec(synthetic).kind)
    (tmp_path / "tokenizer.json").write_text(source.tokenizer, encoding="utf-8")
    text = "The quick brown fox jumps over the lazy dog."
    ids = Tokenizer.load(tmp_path / "tokenizer.json").encode(text)
    assert 9 < len(ids) < len(text)
    assert max(ids) < source.config.vocab_size


@pytest.mark.parametrize("family", ["1.2", "s2"])
def test_the_same_seed_gives_the_same_files(family, tmp_path):
    first, again, other = (
        digests(write_checkpoint(family, tmp_path / str(n), tiny=True, seed=seed)) for n, seed in enumerate((0, 0, 1))
    )
    assert again == first
    differing = {name for name, digest in other.items() if digest != first[name]}
    assert {Path(name).suffix for name in differing} == {Path(name).suffix for name in first} - {".json"}


def test_an_unknown_family_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown family 'x'"):
        write_checkpoint("x", tmp_path)


def test_official_ids(tmp_path):
    size = write_s2(tmp_path / "tokenizer.json", FAMILIES["s2"].text_tokens)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert size == 155774
    wanted = {
        "<|im_start|>": 151644,
        "<|im_end|>": 151645,
        "<|voice|>": 151673,
        "<|semantic:0|>": 151678,
        "<|semantic:4095|>": 155773,
    }
    assert {name: tokenizer.encode(name)[0] for name in wanted} == wanted
    write_special_tokens(tmp_path / "special_tokens.json", ("<|a|>", "<|b|>"), 100)
    assert json.loads((tmp_path / "special_tokens.json").read_text()) == {"<|a|>": 100, "<|b|>": 101}


def test_tensors_do_not_depend_on_the_order_they_are_made_in(tmp_path):
    source = open_language_model(write_checkpoint("s2", tmp_path / "s2", tiny=True), codec="dac")
    weights = LanguageModelWeights(source.config, source.ids.semantic, source.ids.end, seed=0)
    for name, shape in reversed(language_model_shapes(source.config).items()):
        assert torch.equal(weights.tensor(name, shape), source.weights[name])


def test_the_peer_says_the_same(tiny_checkpoint, tiny_bundle):
    """torch in float32, with its cache written in place, draws the frames that the graphs draw."""
    from torch_peer import open_torch, open_torch_decoder

    manifest = tiny_bundle.manifest
    lm = manifest.model
    tts, ours = open_timed(tiny_bundle, provider="cpu", threads=1)
    peer = open_torch(tiny_checkpoint, torch.float32)
    prompt = bench_prompt(tiny_bundle, "Hello there.")
    sampling = Sampling(top_p=1e-6).resolve(lm.sampling)
    spoken = []
    for engines in (ours, peer):
        model = DualAR(engines["slow_ar"], engines["fast_ar"], lm)
        spoken.append(frames_of(model, prompt, sampling, SeededNoise(0), 6))
    assert np.array_equal(spoken[0], spoken[1])
    codes = np.zeros((len(manifest.codec.codebook_sizes), 4), np.int64)
    assert np.allclose(open_torch_decoder(tiny_checkpoint, torch.float32)(codes), tts.decode(codes), atol=1e-4)


def test_a_step_reads_every_weight_but_the_tables(tiny_checkpoint, tiny_bundle):
    source = open_language_model(tiny_checkpoint, codec=open_codec(tiny_checkpoint).kind)
    for role, weights in (("slow_ar", source.slow_weights("audio")), ("fast_ar", source.fast_weights())):
        wanted = 4 * sum(weights[name].numel() for name in weights if "embeddings" not in name)
        read = bytes_read(tiny_bundle.file(tiny_bundle.manifest.specs[role].file))
        assert wanted <= read < wanted + 1000  # the rest are shapes and axes


TIMES = {"median_ms": 10.0, "p95_ms": 12.0, "count": 3}
BENCH = {
    "bundle": {"name": "x", "bytes": 4e8, "frame_rate": 20.0},
    "machine": {"read_gb_s": 28.0},
    "frame": {**TIMES, "median_ms": 20.0},
    "slow_step": TIMES,
    "fast_step": {**TIMES, "median_ms": 1.0},
    "fast_steps_per_frame": 9.0,
    "loop": {**TIMES, "median_ms": 1.0, "share": 0.05},
    "contexts": [{"context": 128, **TIMES}, {"context": 256, **TIMES, "median_ms": 15.0}],
    "codec": {"decode": {**TIMES, "rtf": 0.5}},
    "speak": {**TIMES, "rtf": 0.9},
    "ttfa": {"known_voice": {**TIMES, "median_ms": 321.4}},
    "load": {"cold_s": 9.0, "cached_s": 1.0},
    "memory": {"speaking_peak_bytes": 2**31, "cold_load_peak_bytes": 3 * 2**30},
    "weights": {"slow_share": 0.61},
}
RECORD = {
    "environment": {"cpu": "a CPU", "cores": 2, "versions": {"torch": "9.0", "onnxruntime": "8.0"}},
    "families": {
        "1.5": {
            "export": {name: {"seconds": 95.0, "peak_memory_bytes": 2**32} for name in ("int4", "int8")},
            "recipes": {"int4": BENCH, "int8": BENCH},
            "turns": {"ours": [BENCH], "bf16": [BENCH]},
            "compared": {"recipe": "int4", "frame_ms": {"ours": 20.0, "bf16": 140.0, "best_peer": "bf16", "speed_up": 7.0}},
        }
    },
}


def test_comparing_takes_medians_and_the_better_peer():
    import cpu

    def turn(frame: float) -> dict:
        made = copy.deepcopy(BENCH)
        made["frame"]["median_ms"] = frame
        return made | {"prefill": TIMES}

    turns = {"ours": [turn(9), turn(10), turn(99)], "fp32": [turn(50), turn(60)], "bf16": [turn(70), turn(40), turn(71)]}
    found = compare(turns, cpu.FIGURES)
    assert found["frame_ms"] == {"ours": 10, "fp32": 55, "bf16": 70, "best_peer": "fp32", "speed_up": 5.5}
    assert "speed_up" not in compare({"ours": [turn(9)]}, cpu.FIGURES)["frame_ms"]


def test_a_peer_that_memory_cannot_hold_is_left_out(tmp_path, monkeypatch):
    import cpu

    (tmp_path / "model.pth").write_bytes(b"0" * 600)
    (tmp_path / "codec.pth").write_bytes(b"0" * 100)
    monkeypatch.setattr(cpu, "total_memory", lambda: 1000)
    assert (cpu.fits(tmp_path, "bf16"), cpu.fits(tmp_path, "fp32")) == (True, False)
    monkeypatch.setattr(cpu, "total_memory", lambda: None)
    assert cpu.fits(tmp_path, "fp32")


def test_plots_come_from_the_record_alone(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the dev extra")
    from plot import context_rtf, frame_parts, write_plots

    path = write_record("cpu", RECORD, tmp_path / "cpu.json")
    written = write_plots(path)
    assert [p.name for p in written] == ["cpu-context.svg", "cpu-frame.svg"]
    before = [p.read_bytes() for p in written]
    assert all(len(svg) < 200_000 for svg in before)
    assert [p.read_bytes() for p in write_plots(path)] == before
    assert context_rtf([BENCH], 20.0) == pytest.approx({128: 0.4, 256: 0.5})
    assert frame_parts(BENCH) == {"slow AR": 10.0, "fast AR": 9.0, "loop": 1.0, "codec": 25.0}


BEGIN, END = "<!-- cpu -->", "<!-- /cpu -->"


def test_a_table_is_filled_from_the_record():
    text = tables.filled(f"before\n{BEGIN}\nold\n{END}\nafter\n", "cpu", tables.speed_table(RECORD))
    assert text.startswith(f"before\n{BEGIN}\n| weights |")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "| Fish Speech 1.5, int4 | 20.0 ms | 40% | 7.0 × | 28 GB/s | 61% | 0.50 | 0.90 | 321 ms | 9.0 / 1.0 s |" in text
    assert "| Fish Speech 1.5, int8 | 20.0 ms | 40% |  | 28 GB/s |" in text
    assert tables.filled(text, "cpu", tables.speed_table(RECORD)) == text


def test_the_short_tables_take_the_same_figures():
    assert "| Fish Speech 1.5, int4 | 0.4 GB | 2.0 GiB | 0.90 | 321 ms | 7.0 × |" in tables.short_table(RECORD)
    assert "| Fish Speech 1.5, int8 | 0.4 GB | 2.0 GiB | 3.0 GiB | 2 min | 4.0 GiB |" in tables.memory_table(RECORD)


@pytest.mark.parametrize("name", tables.TABLES)
def test_the_pages_show_the_records(name):
    page, record, table = tables.TABLES[name]
    text = (tables.ROOT / page).read_text(encoding="utf-8")
    assert tables.filled(text, name, table(json.loads((RESULTS / f"{record}.json").read_text()))) == text


@pytest.mark.parametrize("text", ["none", f"{END}{BEGIN}", f"{BEGIN}{END}" * 2])
def test_a_page_without_the_markers_is_left_alone(text):
    with pytest.raises(ValueError, match="once each"):
        tables.filled(text, "cpu", "")


def test_records_say_where_they_come_from(tmp_path):
    record = json.loads(write_record("x", {"figure": 1}, tmp_path / "deep" / "x.json").read_text())
    assert record["benchmark"] == "x"
    assert record["figure"] == 1
    assert {"date", "commit", "cpu", "cores", "memory_bytes", "system", "python", "versions"} <= record["environment"].keys()
    assert {"fishrt", "numpy", "torch"} <= environment()["versions"].keys()


def test_the_precision_table_has_a_row_for_each_recipe():
    figures = {
        "bytes": 9_900_000,
        "word_error_rate": 0.2512,
        "difference": -0.004,
        "difference_95_percent": [-0.012, 0.005],
        "voice_recognised": 1.0,
        "ended_by_itself": 0.99,
    }
    codec = {**figures, "snr_db": 34.04, "least_snr_db": 31.0}
    lines = tables.precision_table({"summary": {"fp32": figures, "int4": figures, "codec": codec}}).splitlines()
    assert lines[2] == "| fp32 | 9.9 MB | 25.1% |  |  | 100.0% | 99.0% |  |"
    assert lines[3] == "| int4 | 9.9 MB | 25.1% | -0.4 points | -1.2 and +0.5 | 100.0% | 99.0% |  |"
    assert lines[4].endswith("| 99.0% | 34.0 dB, 31.0 at least |")
