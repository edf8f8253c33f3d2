"""Each family is identified by its files, and a mixed folder is refused before any graph is made."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner

from fishrt import TTS, Voice
from fishrt.cli import main
from fishrt_export import Options, export_bundle
from fishrt_export.checkpoint.families import FAMILIES, Family
from fishrt_export.errors import ExportError
from fishrt_export.models.slow_ar import SlowAR
from fishrt_export.sources.language_model import open_language_model
from tiny import GoldenModel
from vectors import CHOSEN, find_golden

FOLDERS = {"s2-pro": "s2", "s1-mini": "s1", "fish-1.5": "1.5", "fish-1.4": "1.4", "fish-1.2": "1.2"}
ModelOf = Callable[[str], GoldenModel]


@pytest.fixture(scope="session")
def model_of(models: Callable[[Path], GoldenModel]) -> ModelOf:
    return lambda folder: models(find_golden(CHOSEN, folder))


@pytest.fixture
def folder_of(model_of: ModelOf, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a family's whole checkpoint, to be written to."""
    return lambda folder: Path(shutil.copytree(model_of(folder).checkpoint, tmp_path / folder, dirs_exist_ok=True))


def change_config(checkpoint: Path, without: tuple[str, ...] = (), **changes: Any) -> None:
    path = checkpoint / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in without}), encoding="utf-8")


def refused(checkpoint: Path, message: str, **options: Any) -> str:
    """The whole message of an export that fails at once."""
    stages: list[str] = []
    with pytest.raises(ExportError, match=message) as caught:
        export_bundle(
            checkpoint, checkpoint.parent / "out", Options(**options), progress=lambda stage, _done: stages.append(stage)
        )
    assert stages == ["reading the checkpoint"]
    assert not (checkpoint.parent / "out").exists()
    return str(caught.value)


def test_every_family_is_told_by_its_files(golden_model: GoldenModel) -> None:
    source, name = golden_model.lm, FOLDERS[golden_model.golden.name]
    assert source.family is FAMILIES[name]
    assert source.family.codec == golden_model.codec.kind
    assert source.problems() == []
    for head in ("audio", "full"):
        assert list(source.describe(head).faults()) == []
    assert open_language_model(golden_model.checkpoint, family=name).family is source.family  # at its word


@pytest.mark.parametrize(
    ("folder", "family", "codec", "message"),
    [
        ("fish-1.2", None, None, r"may be of several families: 1\.4, 1\.2"),
        ("fish-1.4", "1.5", None, r"cannot be of the family 1\.5, which has a tokenizer with <\|semantic:0\|>"),
        ("fish-1.4", "1.2", "firefly", r"family 1\.2, which has a codec of the kind 'centred firefly', not 'firefly'"),
        ("fish-1.5", "1.4", None, r"the tokenizer has no <\|semantic\|>"),
    ],
)
def test_a_family_that_the_files_do_not_tell(
    model_of: ModelOf, folder: str, family: str | None, codec: str | None, message: str
) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        open_language_model(model_of(folder).checkpoint, family=family, codec=codec)
    assert caught.value.hint


def test_a_config_of_another_form_needs_the_name(folder_of: Callable[[str], Path]) -> None:
    checkpoint = folder_of("fish-1.5")
    change_config(checkpoint, attention_qk_norm=False)
    with pytest.raises(ExportError, match=r"1\.5: a config\.json without attention_qk_norm"):
        open_language_model(checkpoint, codec="firefly")
    assert open_language_model(checkpoint, codec="firefly", family="1.5").problems() == []


def test_every_family_becomes_a_bundle_that_speaks(golden_model: GoldenModel, tmp_path: Path) -> None:
    """The two commands work together. The export is the session's shared one."""
    if not golden_model.fits:
        pytest.skip("these vectors' language model and codec have numbers of codebooks that do not fit")
    bundle, out = golden_model.bundle, tmp_path / "speech.wav"
    assert {path.name for path in bundle.path.iterdir()} == {"manifest.json", *bundle.manifest.files}
    text = "Hello there! It is a fine day, is it not?"
    limits = ("--max-frames", "6", "--seed", "3", "--provider", "cpu", "--threads", "1")
    result = CliRunner().invoke(main, ["speak", text, "--bundle", str(bundle.path), "-o", str(out), *limits])
    assert result.exit_code == 0, result.output
    pcm, rate = soundfile.read(out)
    codec = bundle.manifest.codec
    assert rate == codec.sample_rate
    assert len(pcm) in range(codec.hop, 6 * codec.hop + 1, codec.hop)
    assert np.abs(pcm).max() > 0
    # A voice has codes of all the codec's codebooks, which may be more than the model's.
    voice = Voice("low", np.ones((len(codec.codebook_sizes), 9), np.int64), "What was said.", codec.fingerprint)
    speech = TTS.load(bundle.path, provider="cpu", threads=1).speak(text, voice=voice, seed=3, max_frames=3)
    assert speech.codes.shape[0] == bundle.manifest.model.num_codebooks
    assert len(speech.pcm) == speech.codes.shape[1] * codec.hop


# ---- mixed folders


def pairs_that_differ(feature: Callable[[Family], object]) -> list[tuple[str, str]]:
    """All folders of two families in which the feature is not the same."""
    pairs = itertools.permutations(FOLDERS, 2)
    return [pair for pair in pairs if len({feature(FAMILIES[FOLDERS[folder]]) for folder in pair}) == 2]


@pytest.mark.parametrize(("model", "codec"), pairs_that_differ(lambda family: family.codec))
def test_a_codec_of_another_generation(folder_of: Callable[[str], Path], model_of: ModelOf, model: str, codec: str) -> None:
    other, checkpoint = model_of(codec), folder_of(model)
    for name in (path.name for path in (model_of(model).golden / "codec/checkpoint").iterdir()):
        (checkpoint / name).unlink()
    shutil.copytree(other.golden / "codec/checkpoint", checkpoint, dirs_exist_ok=True)
    refused(checkpoint, "are not those of one family|codebooks and the codec has")


@pytest.mark.parametrize(
    ("model", "tokenizer"), pairs_that_differ(lambda family: (family.one_semantic, bool(family.control_tokens)))
)
def test_a_tokenizer_of_another_generation(
    folder_of: Callable[[str], Path], model_of: ModelOf, model: str, tokenizer: str
) -> None:
    (theirs,) = (model_of(tokenizer).golden / "lm/checkpoint").glob("tokenizer.*")
    checkpoint = folder_of(model)
    (ours,) = checkpoint.glob("tokenizer.*")
    ours.unlink()
    shutil.copy(theirs, checkpoint)
    refused(checkpoint, "are not those of one family|the tokenizer has")


def test_a_tokenizer_of_another_generation_beside_a_config_that_tells_nothing(
    folder_of: Callable[[str], Path], model_of: ModelOf, caplog: pytest.LogCaptureFixture
) -> None:
    """The config could be 1.4's, whose codec is that of 1.5, so there is only a warning."""
    checkpoint = folder_of("fish-1.5")
    change_config(checkpoint, without=("scale_codebook_embeddings", "share_codebook_embeddings", "is_reward_model"))
    (checkpoint / "tokenizer.tiktoken").unlink()
    shutil.copy(model_of("fish-1.4").checkpoint / "tokenizer.json", checkpoint)
    assert open_language_model(checkpoint, codec="firefly").family.name == "1.4"
    assert "it is the tokenizer of another checkpoint" in caplog.text


def test_a_vocabulary_may_be_padded_freely(folder_of: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    """A padded vocabulary is allowed, but each token needs an embedding."""
    checkpoint = folder_of("s2-pro")
    source = open_language_model(checkpoint)
    tokens = len(json.loads(source.tokenizer)["model"]["vocab"]) + len(json.loads(source.tokenizer)["added_tokens"])
    config = json.loads((checkpoint / "config.json").read_text())
    for size, warned in ((tokens, False), (tokens + 64, False), (3 * tokens, True)):
        caplog.clear()
        change_config(checkpoint, text_config={**config["text_config"], "vocab_size": size})
        assert open_language_model(checkpoint).config.vocab_size == size
        assert (f"for a vocab_size of {size}" in caplog.text) is warned
    change_config(checkpoint, text_config={**config["text_config"], "vocab_size": tokens - 1})
    refused(checkpoint, "tokens and ids up to .* vocab_size")


def test_a_converted_tokenizer_is_that_of_its_family(folder_of: Callable[[str], Path], model_of: ModelOf, tmp_path: Path) -> None:
    """A tokenizer.json with the control tokens that the original has beside its tokenizer.tiktoken."""
    for folder in ("fish-1.5", "s1-mini"):
        checkpoint, source = folder_of(folder), model_of(folder).lm
        for name in ("tokenizer.tiktoken", "special_tokens.json"):
            (checkpoint / name).unlink(missing_ok=True)
        (checkpoint / "tokenizer.json").write_text(source.tokenizer, encoding="utf-8")
        again = open_language_model(checkpoint, codec=source.family.codec)
        assert (again.family, again.ids, again.tokenizer) == (source.family, source.ids, source.tokenizer)


def test_fields_that_are_null_tell_nothing(folder_of: Callable[[str], Path], model_of: ModelOf) -> None:
    """Later code writes them where it saves an earlier model again."""
    checkpoint = folder_of("fish-1.2")
    change_config(checkpoint, fast_dim=None, fast_n_head=None, fast_attention_qkv_bias=None)
    assert open_language_model(checkpoint, codec="centred firefly").config == model_of("fish-1.2").lm.config


@pytest.mark.parametrize(
    ("folder", "other", "name", "message"),
    [
        ("fish-1.5", "fish-1.4", "tokenizer.json", r"has 2 tokenizers: tokenizer\.json, tokenizer\.tiktoken"),
        ("fish-1.5", "s1-mini", "codec.pth", r"has 2 codecs: codec\.pth, firefly-gan-vq-fsq-8x1024-21hz-generator\.pth"),
        ("fish-1.4", "fish-1.2", "model.pth", "wrong shape: codebook_embeddings.weight"),
    ],
)
def test_a_file_of_another_family(
    folder_of: Callable[[str], Path], model_of: ModelOf, folder: str, other: str, name: str, message: str
) -> None:
    checkpoint = folder_of(folder)
    shutil.copy(model_of(other).checkpoint / name, checkpoint)
    refused(checkpoint, message)


# ---- what each family makes of its config


@pytest.mark.parametrize(
    ("folder", "changes", "honoured"),
    [
        *((folder, {"head_dim": 98}, False) for folder in ("fish-1.2", "fish-1.4", "fish-1.5")),
        ("fish-1.5", {"scale_codebook_embeddings": True}, False),
        ("s1-mini", {"scale_codebook_embeddings": False}, True),
        ("s1-mini", {"head_dim": 6, "fast_head_dim": None}, True),
    ],
)
def test_fields_that_a_family_honours(
    folder_of: Callable[[str], Path], model_of: ModelOf, folder: str, changes: dict[str, Any], honoured: bool
) -> None:
    source, checkpoint = model_of(folder).lm, folder_of(folder)
    change_config(checkpoint, **changes)
    config = open_language_model(checkpoint, family=source.family.name).config
    assert (config != source.config) is honoured
    if honoured and "head_dim" in changes:
        assert config.slow.head_dim == config.fast.head_dim == changes["head_dim"]


def test_the_fast_head_dim_is_passed_over_too(folder_of: Callable[[str], Path]) -> None:
    checkpoint = folder_of("fish-1.5")
    change_config(checkpoint, fast_dim=24, fast_n_head=2, fast_n_local_heads=1, fast_head_dim=4)
    config = open_language_model(checkpoint).config
    assert (config.fast.dim, config.fast.heads, config.fast.head_dim) == (24, 2, 12)


@pytest.mark.parametrize(("folder", "counts"), [("fish-1.4", False), ("fish-1.5", True)])
def test_codebooks_that_share_rows(folder_of: Callable[[str], Path], model_of: ModelOf, folder: str, counts: bool) -> None:
    """In families that read the flag, every codebook uses the first one's rows."""
    checkpoint = folder_of(folder)
    change_config(checkpoint, share_codebook_embeddings=False)
    source, usual = open_language_model(checkpoint), model_of(folder).lm
    config = source.config
    prompt = torch.from_numpy(np.random.default_rng(0).integers(0, config.codebook_width, (1, 1 + config.num_codebooks, 4)))
    prompt[:, 0] = source.ids.semantic[0]
    table = usual.weights["codebook_embeddings.weight"]
    repeated = {**usual.weights, "codebook_embeddings.weight": table[: config.codebook_width].repeat(config.num_codebooks, 1)}
    assert torch.equal(embedded(source.slow_ar("full"), prompt), embedded(usual.slow_ar("full"), prompt)) is not counts
    if counts:
        other = type(usual)(usual.config, usual.family, usual.ids, usual.tokenizer, repeated)
        assert torch.equal(embedded(source.slow_ar("full"), prompt), embedded(other.slow_ar("full"), prompt))


def embedded(module: SlowAR, prompt: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module.enter(prompt)


@pytest.mark.parametrize(("positions", "room"), [(1, 1), (512, 256), (4096, 2048), (8192, 6144)])
def test_small_models_keep_room_for_a_prompt(golden_model: GoldenModel, positions: int, room: int) -> None:
    source = replace(golden_model.lm, config=replace(golden_model.lm.config, max_seq_len=positions))
    assert source.describe("audio").max_prompt == room


def test_what_the_originals_remember() -> None:
    windows = {name: family.history_window for name, family in FAMILIES.items()}
    assert windows == {"s2": None, "s1": None, "1.5": 3072, "1.4": 3072, "1.2": 1024}
