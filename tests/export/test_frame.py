"""The frame, as a torch module and as a graph, draws the same as the loop, for every rule of sampling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from fishrt.bundle.features import USUAL, LanguageModel, RepetitionAware, RepetitionPenalty, SamplingDefaults
from fishrt.errors import GraphError, SamplingError
from fishrt.language_model import drawing
from fishrt.language_model.drawing import Drawer, Draws, FrameDrawer, StepDrawer, check_drawn
from fishrt.language_model.sampling import Sampling, SeededNoise, main_ids, sample
from fishrt_engines import Array, GraphSpec
from fishrt_export.errors import ExportError
from fishrt_export.graph.recipe import Recipe
from fishrt_export.graph.report import Feeds
from fishrt_export.graph.verify import run_module, verify
from fishrt_export.models import frame
from fishrt_export.models.frame import Frame
from helpers_lm import draws_of
from tiny import GoldenModel

COLUMNS = 12
SETTINGS = [
    Sampling(0.7, 0.8, None, 1.3),
    Sampling(1.5, 1.0, None, 0.8),
    Sampling(1.0, 0.9, 30, 1.0),
    Sampling(0.01, 1.0, 1, 1.1),
    Sampling(1.9, 1e-6, None, 1.9),
    Sampling(1.0, 0.5, 3, 1.1),
    Sampling(0, 0.9, None, 1.1).resolve(SamplingDefaults(1.0, 0.9, None, None, RepetitionPenalty(1.2, 4, "row"))),  # greedy
]
AWARE = RepetitionAware(window=3, temperature=1.8, top_p=0.99)


def penalty(main: str) -> RepetitionPenalty:
    return RepetitionPenalty(penalty=1.2, window=4, main=main)


RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "repetition-aware": {"repetition_aware": AWARE},
    "penalty by row": {"repetition_penalty": penalty("row")},
    "penalty by the oldest column": {"repetition_penalty": penalty("oldest_column")},
    "penalty on codes only": {"repetition_penalty": penalty("none")},
    "all at once": {"repetition_aware": AWARE, "repetition_penalty": penalty("row")},
}
OTHERS: list[dict[str, Any]] = [{"main_tokens": "any"}, {"code_zero": "fast"}, {"code_zero": "fast", "code_offset": 1}]


class ModuleEngine:
    """The torch module with the interface of an engine."""

    provider = "torch"

    def __init__(self, model: GoldenModel, lm: LanguageModel) -> None:
        self.spec: GraphSpec = model.lm.frame_job(lm, {}).spec
        self._module = Frame(model.fast_ar, lm, self.spec)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return run_module(self._module, self.spec, {name: np.array(feed) for name, feed in feeds.items()})[0]


def model_of(described: LanguageModel, rules: dict[str, Any], **changes: Any) -> LanguageModel:
    settings = {"repetition_aware": None, "repetition_penalty": None, **rules}
    return replace(described, sampling=SamplingDefaults(temperature=1.0, top_p=0.9, top_k=None, **settings), **changes)


def of_another_family(model: GoldenModel, **changes: Any) -> LanguageModel:
    candidates = model.lm.config.codebook_width - 3
    return model_of(model.lm.describe("full"), RULES["penalty by row"], fast_candidates=candidates, **changes)


def short(lm: LanguageModel) -> LanguageModel:
    """Return the model with two codebooks: its graph has all rules and is traced soon."""
    return replace(lm, num_codebooks=2)


def slow_results(golden_model: GoldenModel, head: str, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Yield plausible results of a slow AR: a few tokens are likely, so that they repeat; with odd seeds, logits are below 0."""
    rng = np.random.default_rng(seed)
    logits, hidden = golden_model.engine("slow_ar", head).spec.results
    width = (1, int(logits.shape[1]))
    likely = 6 * (rng.random(width) < 4 / width[1]) - 9 * (seed % 2)
    while True:
        draws = rng.standard_normal(width) + likely
        yield {
            "logits": draws.astype(np.float32),
            "hidden": rng.standard_normal((1, int(hidden.shape[1]))).astype(np.float32),
        }


def drawn_by_both(golden_model: GoldenModel, lm: LanguageModel, whole: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield columns [COLUMNS, 1 + C] drawn by steps and by the engine `whole` from the same noise, for each of the settings."""
    for seed, sampling in enumerate(SETTINGS):
        both = []
        for kind, engine in ((StepDrawer, golden_model.engine("fast_ar")), (FrameDrawer, whole)):
            drawer: Drawer = kind(engine, lm, 1)
            row, columns = draws_of(lm, sampling, seed), []
            for results in islice(slow_results(golden_model, lm.head, seed), COLUMNS):
                columns.append(drawer.draw(results, [row])[0].copy())
                row.add(columns[-1])
            both.append(np.stack(columns))
        yield both[0], both[1]


def assert_same(golden_model: GoldenModel, lm: LanguageModel, whole: Any) -> None:
    repeated = 0
    for stepped, fused in drawn_by_both(golden_model, lm, whole):
        assert np.array_equal(stepped, fused)
        repeated += COLUMNS - len(np.unique(stepped[:, 0]))
        codes = stepped[:, 1 + (lm.code_zero == "main") :]
        assert codes.min() >= lm.code_offset
        assert codes.max() < lm.fast_candidates
    assert repeated > 3  # so that penalty windows matter


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("head", ["audio", "full"])
def test_the_module_draws_as_the_loop_does(s2_model: GoldenModel, rules: dict[str, Any], head: str) -> None:
    lm = model_of(s2_model.lm.describe(head), rules)
    assert_same(s2_model, lm, ModuleEngine(s2_model, lm))


@pytest.mark.parametrize("changes", OTHERS, ids=str)
def test_the_module_draws_as_the_loop_of_another_family_does(s2_model: GoldenModel, changes: dict[str, Any]) -> None:
    lm = of_another_family(s2_model, **changes)
    assert_same(s2_model, lm, ModuleEngine(s2_model, lm))


# A trace takes long. Those of the other rules and families, alone or with all codebooks, are `thorough`.
SOME = [("audio", "plain"), ("audio", "all at once"), ("full", "all at once")]


@pytest.mark.parametrize(
    ("head", "rules"),
    [*SOME, *(pytest.param("audio", rules, marks=pytest.mark.thorough) for rules in RULES if ("audio", rules) not in SOME)],
)
def test_the_graph_draws_as_the_loop_does(s2_model: GoldenModel, head: str, rules: str) -> None:
    lm = short(model_of(s2_model.lm.describe(head), RULES[rules]))
    assert_same(s2_model, lm, s2_model.frame(lm))


@pytest.mark.parametrize(
    "changes", [OTHERS[0], *(pytest.param(changes, marks=pytest.mark.thorough) for changes in OTHERS[1:])], ids=str
)
def test_the_graph_draws_as_the_loop_of_another_family_does(s2_model: GoldenModel, changes: dict[str, Any]) -> None:
    lm = short(of_another_family(s2_model, **changes))
    assert_same(s2_model, lm, s2_model.frame(lm))


def test_the_graph_of_a_family_draws_as_the_loop_does(golden_model: GoldenModel) -> None:
    """With its rules: each of those above, and codes that begin at 1."""
    assert_same(golden_model, golden_model.few, golden_model.frame(golden_model.few))


def test_the_graph_of_all_codebooks_draws_as_the_loop_does(s2_model: GoldenModel) -> None:
    lm = s2_model.lm.describe("audio")
    assert_same(s2_model, lm, s2_model.frame(lm))


@pytest.mark.thorough
def test_the_graph_of_all_codebooks_of_a_family_draws_as_the_loop_does(golden_model: GoldenModel) -> None:
    lm = golden_model.lm.describe("audio")
    assert_same(golden_model, lm, golden_model.frame(lm))


def test_the_noise_of_codes_that_nobody_hears_is_drawn_all_the_same(s2_model: GoldenModel) -> None:
    lm = short(model_of(s2_model.lm.describe("audio"), {}))
    likely = int(np.flatnonzero(main_ids(lm) == lm.end_id)[0])
    results = next(slow_results(s2_model, "audio"))
    results["logits"][0, likely] = 100
    left = []
    for kind, graph in ((StepDrawer, s2_model.engine("fast_ar")), (FrameDrawer, s2_model.frame(lm))):
        noise = SeededNoise(5)
        drawer = kind(graph, lm, 1)  # type: ignore[operator]
        assert drawer.draw(results, [Draws(lm, SETTINGS[0], noise, USUAL)])[0, 0] == lm.end_id
        left.append(noise.fast(8))
    assert np.array_equal(*left)


@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [np.nan, np.inf], None], ids=["nan", "inf", "both", "all minus inf"])
@pytest.mark.parametrize("where", ["logits", "hidden"])
def test_logits_that_are_not_numbers_are_an_error(s2_model: GoldenModel, bad: list[float] | None, where: str) -> None:
    lm = short(model_of(s2_model.lm.describe("audio"), RULES["all at once"]))
    results = next(slow_results(s2_model, "audio"))
    if bad is None:
        results[where][:] = -np.inf
    else:
        results[where][0, 3 : 3 + len(bad)] = bad
    drawer = FrameDrawer(s2_model.frame(lm), lm, 1)
    (column,) = drawer.draw(results, [draws_of(lm, SETTINGS[0], 0)])
    with pytest.raises(GraphError, match="not numbers"):
        check_drawn(column)


def test_more_candidates_than_are_ranked_are_an_error(s2_model: GoldenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "MOST_RANKED", 8)
    monkeypatch.setattr(drawing, "FEW_RANKED", 8)
    lm = short(model_of(s2_model.lm.describe("audio"), {}))
    engine, results = s2_model.frame(lm), next(slow_results(s2_model, "audio"))
    results["logits"][:] = 0

    def drawn(sampling: Sampling) -> np.ndarray:
        columns = FrameDrawer(engine, lm, 1).draw(results, [draws_of(lm, sampling, 0)])
        check_drawn(columns[0])
        return columns

    with pytest.raises(SamplingError, match="more than 8 tokens") as caught:
        drawn(Sampling(1.0, 0.99, None))
    assert "top_k of at most 8" in str(caught.value.hint)
    with pytest.raises(SamplingError):
        drawn(Sampling(1.0, 0.99, 9))
    assert drawn(Sampling(1.0, 0.99, 8)).min() >= 0
    # Few enough are within top_p: the result equals that of a full ranking.
    results["logits"][0, :5] = 50
    step = StepDrawer(s2_model.engine("fast_ar"), lm, 1)
    assert np.array_equal(step.draw(results, [draws_of(lm, Sampling(1.0, 0.9, 8), 0)]), drawn(Sampling(1.0, 0.9, 8)))


@pytest.mark.parametrize(("top_ks", "few"), [([30], True), ([64, 1], True), ([64, 65], False), ([None], False), ([0, 30], True)])
def test_few_are_ranked_if_no_row_draws_more(
    s2_model: GoldenModel, monkeypatch: pytest.MonkeyPatch, top_ks: list[int | None], few: bool
) -> None:
    """0: an idle row."""
    lm = short(model_of(s2_model.lm.describe("audio"), {}))
    engine, fed = ModuleEngine(s2_model, lm), []
    run = engine.run
    monkeypatch.setattr(engine, "run", lambda feeds: fed.append(feeds) or run(feeds))
    drawer = FrameDrawer(engine, lm, len(top_ks))  # type: ignore[arg-type]
    results = next(slow_results(s2_model, "audio"))
    rows = [None if top_k == 0 else draws_of(lm, Sampling(1.0, 0.9, top_k), 0) for top_k in top_ks]
    drawer.draw({name: array.repeat(len(rows), 0) for name, array in results.items()}, rows)
    for name, candidates in (("main_ranks", len(main_ids(lm))), ("code_ranks", lm.fast_candidates)):
        assert candidates > 64
        assert np.array_equal(fed[0][name], np.arange(64 if few else candidates))


@pytest.mark.parametrize("most", [64, 3839])
@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.999, 1.0])
def test_sums_in_float32_draw_what_sums_in_float64_draw(most: int, top_p: float) -> None:
    """Of 4,097 candidates, as S2 has: peaked, and as flat as the ranks allow."""
    rng, rows, count = np.random.default_rng(most), 200, 4097
    spread = rng.uniform(2 if most == 64 or top_p > 0.99 else 0.5, 8, (rows, 1))
    logits, noise = (
        (spread * rng.standard_normal((rows, count))).astype("f4"),
        rng.standard_exponential((rows, count)).astype("f4"),
    )
    of_torch = [torch.from_numpy(array) for array in (logits, noise)]
    settings = torch.full((rows, 1), 0.9), torch.full((rows, 1), top_p), torch.full((rows, 1), most)
    ranked = frame.rank(of_torch[0], torch.arange(most))
    found = frame.draw(ranked, of_torch[1], *settings)[1][:, 0].numpy()
    expected = [sample(logits[n], Sampling(0.9, top_p, most), noise[n]) for n in range(rows)]
    assert np.array_equal(found, expected)


def test_a_top_p_of_1_removes_nothing() -> None:
    """A sum that is rounded up does not remove the last candidate."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.standard_normal((500, 40)).astype("f4"))
    ranked, ones = frame.rank(logits, torch.arange(40)), torch.ones((500, 1))
    assert (ranked.mass[:, -1:] > ranked.total).any(), "nothing is shown without such rounding"
    last = torch.ones((500, 40)).scatter(1, ranked.order[:, -1:], 1e-9)
    assert torch.equal(frame.draw(ranked, last, ones, ones, ones.long() * 40)[0], ranked.order[:, -1:])


def random_feeds(spec: GraphSpec, batch: int) -> Feeds:
    rng = np.random.default_rng(0)
    feeds: Feeds = {}
    for tensor in spec.inputs:
        shape = tensor.resolve({"batch": batch, "main_ranked": 9, "code_ranked": 7})
        if tensor.name.endswith("ranks"):
            feeds[tensor.name] = np.arange(shape[0])
            continue
        feeds[tensor.name] = rng.integers(0, 5, shape) if tensor.dtype == "int64" else rng.exponential(size=shape).astype("f4")
    feeds["top_k"] += 2
    feeds["top_p"] = np.linspace(0.3, 1, batch, dtype=np.float32)[:, None]
    return feeds


def test_rows_of_a_batch_are_drawn_alone(s2_model: GoldenModel) -> None:
    lm = short(model_of(s2_model.lm.describe("audio"), RULES["all at once"]))
    engine = s2_model.frame(lm)
    feeds = random_feeds(engine.spec, 3)
    together = engine.run(feeds)["column"]
    ranks = {name: feeds[name] for name in ("main_ranks", "code_ranks")}
    alone = [engine.run({name: array[n : n + 1] for name, array in feeds.items()} | ranks)["column"] for n in range(3)]
    assert np.array_equal(together, np.concatenate(alone))


def test_each_row_is_drawn_by_its_own_settings(s2_model: GoldenModel) -> None:
    """By both drawers as alone, beside an idle row, and after a row has made room for another."""
    lm = short(model_of(s2_model.lm.describe("audio"), RULES["all at once"]))
    fast, frame_engine = s2_model.engine("fast_ar"), ModuleEngine(s2_model, lm)
    drawers: list[Drawer] = [StepDrawer(fast, lm, 4), FrameDrawer(frame_engine, lm, 4)]  # type: ignore[arg-type]
    alone: list[Drawer] = [StepDrawer(fast, lm, 1) for _ in range(4)]

    def draws(slots: dict[int, int]) -> list[Draws | None]:
        return [draws_of(lm, SETTINGS[slots[n]], slots[n]) if n in slots else None for n in range(4)]

    groups = [draws({0: 0, 2: 2, 3: 1}) for _ in range(3)]
    results = [slow_results(s2_model, "audio", seed) for seed in range(4)]
    for step in range(8):
        if step == 4:
            for group, more in zip(groups, (draws({2: 5}) for _ in groups), strict=True):
                group[2] = more[2]
        parts = [next(result) for result in results]
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        drawn = [drawer.draw(whole, group).copy() for drawer, group in zip(drawers, groups[:2], strict=True)]
        for n in (0, 2, 3):
            single = groups[2][n]
            assert single is not None
            column = alone[n].draw(parts[n], [single])[0].copy()
            for columns, group in zip((drawn[0], drawn[1]), groups[:2], strict=True):
                np.testing.assert_array_equal(columns[n], column)
                group[n].add(column)  # type: ignore[union-attr]
            single.add(column)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_the_graph_refers_to_the_weights_of_the_fast_ar(s2_model: GoldenModel, tmp_path: Path, precision: str) -> None:
    """In every format, which the job verifies; what it stores itself is small."""
    lm = short(s2_model.lm.describe("audio"))
    fast = s2_model._job("fast_ar", "audio")
    recipe = Recipe(precision, {"fast_ar.output": "int4"} if precision == "int8" else {})
    plan = recipe.plan({"fast_ar": fast.build()}, {"fast_ar": fast.weights})["fast_ar"]
    replace(fast, plan=plan).run(tmp_path)
    job = s2_model.lm.frame_job(lm, plan)
    made = job.run(tmp_path)
    assert made.parity.summary(job.spec) == "0.0% of columns differ, 3.1% are allowed"
    assert {file.name for file in tmp_path.iterdir()} == {"fast_ar.onnx", "fast_ar.onnx.data", "frame.onnx"}
    onnx.checker.check_model(str(tmp_path / "frame.onnx"), full_check=True)
    there, here = (
        {t.name: t for t in onnx.load(tmp_path / name, load_external_data=False).graph.initializer}
        for name in ("fast_ar.onnx", "frame.onnx")
    )
    for name in (*fast.weights, *(f"{name}.scales" for name, storage in plan.items() if storage.block)):
        ours, theirs = here[f"fast.{name}"], there[name]
        ours.name = name
        assert ours == theirs
    own = [t for name, t in here.items() if not name.startswith("fast.")]
    assert not any(t.external_data for t in own)
    assert sum(t.ByteSize() for t in own) < 20_000


def test_a_frame_that_draws_otherwise_is_not_taken_for_the_module(s2_model: GoldenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = short(model_of(s2_model.lm.describe("audio"), RULES["all at once"]))
    job, folder = s2_model.lm.frame_job(lm, {}), s2_model.frame_file(lm).parent

    def compare(lm: LanguageModel) -> None:
        verify(Frame(s2_model.fast_ar, lm, job.spec), [job.spec], folder, job.cases, job.tolerance)

    compare(lm)
    other = model_of(lm, {"repetition_aware": replace(AWARE, temperature=0.1), "repetition_penalty": penalty("row")})
    for changed in (other, replace(lm, semantic_begin_id=lm.semantic_begin_id + 1, semantic_end_id=lm.semantic_end_id + 1)):
        with pytest.raises(ExportError, match="rows of column differ"):
            compare(changed)
    monkeypatch.setattr(frame, "penalised", lambda logits, *_: logits)
    with pytest.raises(ExportError, match="rows of column differ"):
        compare(lm)
