"""The language model's modules and exported graphs against the original implementations, of every family."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fishrt.language_model.batch import DualAR
from fishrt.language_model.sampling import Sampling, audio_ids, main_ids
from fishrt_engines import Engine
from fishrt_export.graph.verify import run_module
from fishrt_export.options import Lora
from fishrt_export.sources.language_model import LanguageModelSource, open_language_model
from helpers_lm import row_of, spoken
from tiny import GoldenModel, assert_same_table, caches, chunk_feeds, prefill_feeds
from tolerances import TOLERANCES
from vectors import CHOSEN, find_golden

pytestmark = pytest.mark.parity
HEADS = ("audio", "full")


@dataclass(frozen=True)
class Vectors:
    meta: dict[str, Any]
    arrays: Any

    def prompt(self, name: str) -> np.ndarray:
        return self.arrays[name].astype(np.int64)


@pytest.fixture(scope="module")
def vectors(golden: Path) -> Vectors:
    return vectors_of(golden)


def vectors_of(golden: Path) -> Vectors:
    meta = json.loads((golden / "lm/meta.json").read_text(encoding="utf-8"))
    return Vectors(meta, np.load(golden / "lm/vectors.npz"))


def assert_near(actual: Any, expected: np.ndarray) -> None:
    actual = np.asarray(actual)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= TOLERANCES["lm"]


@pytest.fixture(scope="module")
def whole_forward(golden_model: GoldenModel, vectors: Vectors) -> dict[str, torch.Tensor]:
    """All stages of the slow AR's torch module over the whole input, at every position."""
    module = golden_model.slow_ar
    if not golden_model.lm.config.codebook_offsets:
        pytest.skip("the original leaves out the offsets of codebooks in cached runs only")
    prompt = torch.from_numpy(vectors.prompt("slow/input"))[None]
    length = prompt.shape[2]
    outputs: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda _module, _args, out: outputs.append(out[0][0])) for layer in module.layers]
    with torch.no_grad():
        x = module.enter(prompt)
        states = golden_model.lm.jobs("full")[0].spec.state_tensors
        y, _ = module.run_layers(
            x, torch.arange(length)[None], torch.zeros(1, dtype=torch.int64), caches(states, batch=1, cache=length)
        )
        logits, hidden = module.read_out(y)
        normed = module.norm(y)
    for hook in hooks:
        hook.remove()
    return {"embed": x[0], "layer_out": torch.stack(outputs), "normed": normed[0], "logits": logits[0], "fast_input": hidden[0]}


@pytest.mark.parametrize("stage", ["embed", "layer_out", "normed", "logits", "fast_input"])
def test_slow_ar_module(whole_forward: dict[str, torch.Tensor], vectors: Vectors, stage: str) -> None:
    assert_near(whole_forward[stage], vectors.arrays[f"slow/{stage}"])


@pytest.mark.parametrize("head", HEADS)
def test_slow_ar_graph_with_cache(golden_model: GoldenModel, vectors: Vectors, head: str) -> None:
    """Prefill and single steps: logits, the fast AR's input, and the caches at the end."""
    engine, prompt = golden_model.engine("slow_ar", head), vectors.prompt("slow/input")
    length = prompt.shape[1]
    state = engine.new_state(batch=1, cache=length)
    results = run_steps(engine, state, prompt, vectors.meta["slow_prefill_len"])
    assert_near(results["logits"], vectors.arrays["slow/logits_cached"][:, rows_of(golden_model.lm, head)])
    assert_near(results["hidden"], vectors.arrays["slow/fast_input_cached"])
    for kind, name in (("key", "slow/k_cache"), ("value", "slow/v_cache")):
        layers = range(golden_model.lm.config.slow.layers)
        assert_near(np.stack([state.read(f"{kind}_cache.{i}")[0] for i in layers]), vectors.arrays[name])


def run_steps(engine: Engine, state: Any, prompt: np.ndarray, prefill: int) -> dict[str, np.ndarray]:
    """Return the outputs after a prefill of `prefill` columns, and after each later column."""
    calls = [prefill_feeds([prompt[:, :prefill]])]
    calls += [chunk_feeds(prompt[None, :, t : t + 1], np.array([t])) for t in range(prefill, prompt.shape[1])]
    results = [{name: value[0].copy() for name, value in engine.run(feeds, state).items()} for feeds in calls]
    return {name: np.stack([result[name] for result in results]) for name in results[0]}


def rows_of(source: LanguageModelSource, head: str) -> Any:
    """Return the tokens whose logits a head computes."""
    return source.audio_head if head == "audio" else slice(None)


def assert_last_logits(model: GoldenModel, source: LanguageModelSource, head: str, vectors: Vectors, name: str) -> None:
    """Check the logits at the last four positions of the slow AR's input."""
    assert source.problems() == []
    engine, prompt = model.engine_of(source, "slow_ar", head, name), vectors.prompt("slow/input")
    length = prompt.shape[1]
    results = run_steps(engine, engine.new_state(batch=1, cache=length), prompt, length - 3)
    assert_near(results["logits"], vectors.arrays[f"{name}/logits"][:, rows_of(source, head)])


@pytest.mark.parametrize("head", HEADS)
def test_slow_ar_graph_of_a_merged_lora(golden_model: GoldenModel, vectors: Vectors, head: str) -> None:
    if "lora/logits" not in vectors.arrays:
        pytest.skip("no LoRA among these vectors")
    folder = golden_model.golden / "lm/lora"
    settings = json.loads((folder / "lora_config.json").read_text(encoding="utf-8"))
    (path,) = folder.glob("*.ckpt")
    lora = Lora(path, settings["lora_alpha"], settings["r"])
    source = open_language_model(golden_model.checkpoint, codec=golden_model.codec.kind, lora=lora)
    for array, name in (("wqkv0", "layers.0.attention.wqkv.weight"), ("embeddings_head", "embeddings.weight")):
        expected = vectors.arrays[f"lora/{array}"]
        assert np.abs(source.weights[name][: len(expected)].numpy() - expected).max() <= TOLERANCES["merged"]
    assert_last_logits(golden_model, source, head, vectors, "lora")


@pytest.mark.parametrize("head", HEADS)
def test_slow_ar_graph_of_an_int8_checkpoint(golden_model: GoldenModel, vectors: Vectors, head: str) -> None:
    if "int8/logits" not in vectors.arrays:
        pytest.skip("no int8 checkpoint among these vectors")
    source = open_language_model(golden_model.golden / "lm/checkpoint-int8", codec=golden_model.codec.kind)
    assert_last_logits(golden_model, source, head, vectors, "int8")


@pytest.mark.parametrize("half", ["slow", "fast"])
def test_rotary_tables(golden_model: GoldenModel, vectors: Vectors, half: str) -> None:
    module = golden_model.slow_ar if half == "slow" else golden_model.fast_ar
    expected = vectors.arrays[f"rope/{half}"]
    rows = len(expected)
    assert_same_table(torch.stack([module.cos[:rows], module.sin[:rows]], dim=-1), expected)


def test_fast_ar_graph(golden_model: GoldenModel, vectors: Vectors) -> None:
    """Teacher-forced, one position at a time, all cases as one batch; the state still holds another frame."""
    engine = golden_model.engine("fast_ar")
    codes = vectors.prompt("fast/forced_codes")
    hidden = vectors.arrays["slow/fast_input"][vectors.arrays["fast/positions"]]
    batch, count = codes.shape
    state = engine.new_state(batch=batch)
    for feed_codes in (codes[::-1], codes):
        logits = []
        for position in range(count):
            feeds = {
                "hidden": hidden,
                "codes": np.zeros((batch, 1), np.int64)
                if position == 0
                else np.ascontiguousarray(feed_codes[:, position - 1 : position]),
                "position_ids": np.full((batch, 1), position),
                "write_index": np.full(batch, position),
            }
            logits.append(engine.run(feeds, state)["logits"].copy())
    assert_near(np.stack(logits, axis=1), vectors.arrays["fast/logits"])


def test_fast_ar_graph_two_positions_at_once(golden_model: GoldenModel, vectors: Vectors) -> None:
    engine = golden_model.engine("fast_ar")
    codes = vectors.prompt("fast/forced_codes")
    batch, count = codes.shape
    if count < 2:
        pytest.skip("one codebook only")
    feeds = {
        "hidden": vectors.arrays["slow/fast_input"][vectors.arrays["fast/positions"]],
        "codes": np.stack([np.zeros(batch, np.int64), codes[:, 0]], axis=1),
        "position_ids": np.tile(np.arange(2), (batch, 1)),
        "write_index": np.zeros(batch, np.int64),
    }
    assert_near(engine.run(feeds, engine.new_state(batch=batch))["logits"], vectors.arrays["fast/logits"][:, 1])


def test_fast_ar_module(golden_model: GoldenModel, vectors: Vectors) -> None:
    spec = golden_model.lm.jobs("audio")[1].spec
    codes = vectors.prompt("fast/forced_codes")
    batch, count = codes.shape
    feeds = {
        "hidden": vectors.arrays["slow/fast_input"][vectors.arrays["fast/positions"]],
        "codes": np.concatenate([np.zeros((batch, 1), np.int64), codes[:, :-1]], axis=1),
        "position_ids": np.tile(np.arange(count), (batch, 1)),
        "write_index": np.zeros(batch, np.int64),
    }
    results, _ = run_module(golden_model.fast_ar, spec, feeds, caches(spec.state_tensors, batch=batch))
    assert_near(results["logits"], vectors.arrays["fast/logits"][:, -1])


class RecordedNoise:
    """The originals' noise: slow_draws [frames, draws, vocabulary], fast_draws [frames, draws, width]."""

    def __init__(self, ids: np.ndarray, slow_draws: np.ndarray, fast_draws: np.ndarray) -> None:
        self._slow, self._fast = (
            iter(slow_draws[..., ids].reshape(-1, len(ids))),
            iter(fast_draws.reshape(-1, fast_draws.shape[-1])),
        )

    def slow(self, width: int) -> np.ndarray:
        draw = next(self._slow)
        assert len(draw) == width
        return draw

    def fast(self, width: int) -> np.ndarray:
        draw = next(self._fast)
        assert len(draw) == width
        return draw


class NoNoise:
    """Noise of greedy runs, in which only one token can be drawn."""

    def slow(self, width: int) -> np.ndarray:
        return np.ones(width, np.float32)

    fast = slow


def prompt_of(vectors: Vectors, case: str) -> np.ndarray:
    """Return the prompt of a case, whose note begins with the prompt's name."""
    return vectors.prompt(vectors.meta["generation"][case]["note"].split()[0].rstrip(";,"))


def is_greedy(case: dict[str, Any]) -> bool:
    return case["sampling"].get("top_k") == 1 or case["sampling"]["top_p"] <= 1e-6


def noise_of(model: DualAR, vectors: Vectors, name: str) -> Any:
    """Return the recorded noise; a case without it is greedy."""
    if f"gen/{name}/q_slow" not in vectors.arrays:
        assert is_greedy(vectors.meta["generation"][name])
        return NoNoise()
    ids = main_ids(model.language_model)
    return RecordedNoise(ids, vectors.arrays[f"gen/{name}/q_slow"], vectors.arrays[f"gen/{name}/q_fast"])


def same_candidates(golden_model: GoldenModel, head: str, case: dict[str, Any], raw: np.ndarray) -> bool:
    """Return whether this head can draw the recorded tokens.

    If the original draws from all tokens, the audio head lacks most of them: the likeliest token is then the same if it is an
    audio token, but probabilities differ.
    """
    described = golden_model.lm.describe("full")
    if head == "full" or described.main_tokens == "audio":
        return True
    return is_greedy(case) and bool(np.isin(raw[0], audio_ids(described)).all())


def columns_of(model: DualAR, prompt: np.ndarray, case: dict[str, Any], noise: Any) -> np.ndarray:
    limit = case["max_new_tokens"]
    row = row_of(model, prompt, Sampling(**case["sampling"]), noise, limit, upstream=True)
    spoken(model, row)
    return row.drawn


def assert_enough(compared: int, total: int, head: str, least: int) -> None:
    """Check that all cases of the full head were compared, and `least` of the audio head, which lacks some tokens."""
    if head == "audio" and CHOSEN and not compared:
        pytest.skip("the audio head lacks a token of each of these runs")
    assert compared == total if head == "full" else compared >= (0 if CHOSEN else least)


@pytest.mark.parametrize("head", HEADS)
def test_generation(golden_model: GoldenModel, vectors: Vectors, head: str) -> None:
    """Every case: greedy, with repetition penalty, or with recorded noise."""
    check_generation(golden_model.dual_ar(head), golden_model, vectors, head)


def test_generation_by_the_frame_graph(s2_model: GoldenModel, s2_golden: Path) -> None:
    """The same cases, of one family: a trace of all codebooks takes long."""
    check_generation(framed(s2_model, "audio"), s2_model, vectors_of(s2_golden), "audio")


@pytest.mark.thorough
@pytest.mark.parametrize("head", HEADS)
def test_generation_by_the_frame_graph_of_a_family(golden_model: GoldenModel, vectors: Vectors, head: str) -> None:
    check_generation(framed(golden_model, head), golden_model, vectors, head)


def framed(golden_model: GoldenModel, head: str) -> DualAR:
    """Return the language model with its frame graph instead of its fast AR."""
    loop = golden_model.dual_ar(head)
    return DualAR(loop.slow, golden_model.frame(loop.language_model), loop.language_model)


def check_generation(model: DualAR, golden_model: GoldenModel, vectors: Vectors, head: str) -> None:
    described, compared = vectors.meta["generation"], 0
    assert described.keys() == {name.split("/")[1] for name in vectors.arrays if name.startswith("gen/")}
    for name, case in described.items():
        raw = vectors.arrays[f"gen/{name}/raw"]
        if not same_candidates(golden_model, head, case, raw):
            continue
        actual = columns_of(model, prompt_of(vectors, name), case, noise_of(model, vectors, name))
        assert np.array_equal(actual, raw), name
        assert (actual[0, -1] == model.language_model.end_id) == case["stopped_by_im_end"], name
        compared += 1
    assert_enough(compared, len(described), head, 2)


@pytest.mark.parametrize("head", HEADS)
def test_long_generation(golden_model: GoldenModel, vectors: Vectors, head: str) -> None:
    """Every chunk of every prompt case, and the codes as upstream returns them."""
    model, compared, total = golden_model.dual_ar(head), 0, 0
    for name, case in vectors.meta["prompt_cases"].items():
        for number, chunk in enumerate(case["chunks"]):
            key = f"longgen/{name}/{number}"
            if f"{key}/raw" not in vectors.arrays:
                continue
            prompt, raw = vectors.prompt(chunk["prompt"]), vectors.arrays[f"{key}/raw"]
            total += 1
            if not same_candidates(golden_model, head, case, raw):
                continue
            sampling, limit = Sampling(**case["sampling"]), case["max_new_tokens"]
            row = row_of(model, prompt, sampling, NoNoise(), limit, upstream=True)
            assert np.array_equal(np.stack(spoken(model, row), axis=1), vectors.arrays[f"{key}/codes"]), key
            assert np.array_equal(row.drawn, raw), key
            compared += 1
    assert total == sum(key.startswith("longgen/") and key.endswith("/raw") for key in vectors.arrays)
    assert_enough(compared, total, head, total // 2)


def test_codes_of_a_run(golden_model: GoldenModel, vectors: Vectors) -> None:
    """Every case with codes as upstream returns them; in the repository's vectors, at least one ends with the end token."""
    model, reasons = golden_model.dual_ar("full"), []
    for name, case in vectors.meta["generation"].items():
        if f"gen/{name}/codes" not in vectors.arrays:
            continue
        noise, sampling, limit = noise_of(model, vectors, name), Sampling(**case["sampling"]), case["max_new_tokens"]
        row = row_of(model, prompt_of(vectors, name), sampling, noise, limit, upstream=True)
        assert np.array_equal(np.stack(spoken(model, row), axis=1), vectors.arrays[f"gen/{name}/codes"]), name
        assert (row.stop_reason == "end") == case["stopped_by_im_end"], name
        reasons.append(row.stop_reason)
    assert CHOSEN or "end" in reasons


def test_a_folder_of_vectors_that_is_chosen_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="FISHRT_GOLDEN"):
        find_golden(str(tmp_path / "absent"), "s2-pro")
