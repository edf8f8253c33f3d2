"""Checkpoints of any legal sizes, of every family: they are identified, and modules, graphs and bundles follow the rules.

The sizes are drawn from a seeded generator: odd widths, one layer, groups of heads, one codebook, padded vocabularies, fields
that are absent or null.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fishrt import TTS
from fishrt.bundle.folder import Bundle
from fishrt_engines import open_engine
from fishrt_export import Options, export_bundle
from fishrt_export.checkpoint.families import FAMILIES
from fishrt_export.models.codec.carry import Carry
from fishrt_export.models.codec.dac import Dac
from fishrt_export.models.codec.dac_config import DacConfig
from fishrt_export.models.codec.firefly import Firefly, FireflyConfig
from fishrt_export.sources.codec import CodecSource, open_codec
from fishrt_export.sources.language_model import LanguageModelSource, open_language_model
from reference_lm import fast_forward, slow_forward
from synthetic import (
    BEGIN,
    EVERYTHING,
    PLAIN,
    SEMANTIC,
    random_weights,
    write_flat,
    write_nested,
    write_tiktoken,
    write_tokenizer,
)
from tiny import caches
from tolerances import TOLERANCES

FIRST = 256
"""Id of the first control token behind a tiny tokenizer.tiktoken."""


# ---- the language model


def random_config(name: str, rng: np.random.Generator) -> dict[str, Any]:
    """Return random sizes of a language model of this family by flat names, with a value for every field."""
    old = "head_dim" not in FAMILIES[name].honours

    def flag() -> bool:
        return bool(rng.integers(2))

    def stack(half: str, dim: int | None = None) -> dict[str, Any]:
        kv_heads, groups, width = (int(rng.integers(1, most)) for most in (4, 4, 6))
        heads, width = kv_heads * groups, 2 * width
        free = heads * (width if old else int(rng.integers(1, 6)))
        return {
            f"{half}dim": free if dim is None else dim,
            f"{half}n_head": heads,
            f"{half}n_local_heads": kv_heads,
            f"{half}head_dim": width,
            f"{half}intermediate_size": int(rng.integers(5, 32)),
            f"{half}attention_qkv_bias": flag(),
            f"{half}attention_o_bias": not old and flag(),
            f"{half}attention_qk_norm": not old and flag(),
        }

    slow = stack("")
    fast = {f"fast_{field}": value for field, value in slow.items()} if name == "1.2" or flag() else stack("fast_")
    return {
        "model_type": "dual_ar",
        **slow,
        **fast,
        "n_layer": int(rng.integers(1, 4)),
        "n_fast_layer": int(rng.integers(1, 3)),
        "num_codebooks": int(rng.integers(1, 12)),
        "codebook_size": int(rng.integers(3, 40)),
        "rope_base": float(rng.choice([77.0, 10000.0, 1000000.0])),
        "norm_eps": float(rng.choice([1e-5, 1e-6])),
        "max_seq_len": int(rng.integers(16, 65)),
        "tie_word_embeddings": flag(),
        "scale_codebook_embeddings": name == "s2" or (name == "s1" and flag()),
        "norm_fastlayer_input": name == "s2",
        "share_codebook_embeddings": name != "1.5" or flag(),
    }


def write_checkpoint(folder: Path, name: str, config: dict[str, Any], rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Write a checkpoint in the family's form. Fields that default to the slow AR's are null, absent or given.

    Sets the vocabulary of `config`, from as large as the tokenizer to four times as large. Returns the weights.
    """
    tokens = {"s2": BEGIN + SEMANTIC + 2, "s1": FIRST + 8 + SEMANTIC, "1.5": FIRST + 12 + 1024}.get(name, BEGIN + SEMANTIC + 2)
    config["vocab_size"] = int(rng.integers(tokens, 4 * tokens))
    weights = random_weights(config, seed=int(rng.integers(1000)))
    if name == "s2":
        write_nested(folder, config, weights, shards=int(rng.integers(3)))
        return weights
    written = dict(config)
    fields = {"1.2": 0, "1.4": 1, "1.5": 2, "s1": 3}[name]
    later = (
        [field for field in config if field.startswith("fast_")] + ["share_codebook_embeddings"],
        ["scale_codebook_embeddings"],
        ["attention_o_bias", "attention_qk_norm", "fast_attention_o_bias", "fast_attention_qk_norm"],
        ["norm_fastlayer_input"],
    )
    for field in (field for release in later[fields:] for field in release):
        written.pop(field, None)
    if name == "s1":
        del written["share_codebook_embeddings"]
    else:
        written["head_dim"] = 64  # ignored by the original code of this family
    for field in [field for field in written if field.startswith("fast_")]:
        if written[field] == config[field.removeprefix("fast_")] and rng.integers(2):
            written[field] = None
    write_flat(folder, written, weights)
    if name in ("s1", "1.5"):
        (folder / "tokenizer.json").unlink()
        control = [*(f"<|c{i}|>" for i in range(7)), "<|im_end|>", *(f"<|semantic:{i}|>" for i in range(SEMANTIC))]
        write_tiktoken(folder, control if name == "s1" else None)
    else:
        write_tokenizer(folder, one=True)
    return weights


def expected_ids(name: str) -> tuple[range, int]:
    """Return the ids of the semantic tokens and of the end token in `write_checkpoint`."""
    if name == "1.5":
        return range(FIRST + 12, FIRST + 12 + 1024), FIRST + 4
    if name == "s1":
        return range(FIRST + 8, FIRST + 8 + SEMANTIC), FIRST + 7
    return range(BEGIN, BEGIN + (SEMANTIC if name == "s2" else 1)), 20


def random_prompt(config: dict[str, Any], semantic: range, length: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    audio = rng.random(length) < 0.5
    main = np.where(audio, rng.integers(semantic.start, semantic.stop, length), rng.integers(0, config["vocab_size"], length))
    codes = rng.integers(0, config["codebook_size"], (config["num_codebooks"], length))
    return np.concatenate([main[None], codes * audio])


def assert_as_the_rules_say(source: LanguageModelSource, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    """Compare the torch modules with `reference_lm`, a numpy model that is written from the rules."""
    assert source.problems() == []
    exact = {name: tensor.double().numpy() for name, tensor in weights.items()}
    if not config.get("share_codebook_embeddings", True):  # all codebooks look into the rows of the first
        table = exact["codebook_embeddings.weight"][: config["codebook_size"]]
        exact["codebook_embeddings.weight"] = np.tile(table, (config["num_codebooks"], 1))
    semantic, length = source.ids.semantic, 9
    prompt = random_prompt(config, semantic, length)
    logits, hidden = slow_forward(config, exact, prompt, semantic[0], semantic[-1])
    slow, (slow_job, fast_job) = source.slow_ar("full"), source.jobs("full")
    ids, start = torch.from_numpy(prompt)[None], torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        cache = caches(slow_job.spec.state_tensors, batch=1, cache=length)
        x, _ = slow.run_layers(slow.enter(ids), torch.arange(length)[None], start, cache)
        found_logits, found_hidden = slow.read_out(x)
        assert error(found_logits[0], logits) <= TOLERANCES["reference"]
        assert error(found_hidden[0], hidden) <= TOLERANCES["reference"]

        codes, count = prompt[1:, -1], config["num_codebooks"]
        found, *_ = source.fast_ar()(
            torch.from_numpy(hidden[-1:]).float(),
            torch.from_numpy(np.concatenate([[0], codes[:-1]]))[None],
            torch.arange(count)[None],
            start,
            caches(fast_job.spec.state_tensors, batch=1),
        )
    expected = fast_forward(config, exact, hidden[-1], codes[:-1])
    assert error(found[0], expected[-1]) <= TOLERANCES["reference"]


def error(found: torch.Tensor, expected: np.ndarray) -> float:
    """Return the largest absolute difference for values up to 1, relative for larger ones: random weights give hundreds."""
    return float(np.abs(found.numpy() - expected).max() / max(1.0, np.abs(expected).max()))


VARIANTS = {
    "plain": PLAIN,
    "everything": EVERYTHING,
    "qkv bias": {**PLAIN, "attention_qkv_bias": True, "fast_attention_qkv_bias": True},
    "output bias": {**PLAIN, "attention_o_bias": True, "fast_attention_o_bias": True},
    "qk norm, slow": {**PLAIN, "attention_qk_norm": True},
    "qk norm, fast": {**PLAIN, "fast_attention_qk_norm": True},
    "untied": {**PLAIN, "tie_word_embeddings": False},
    "projected": {**PLAIN, "fast_dim": 10, "norm_fastlayer_input": True},
    "projected, not normed": {**PLAIN, "fast_dim": 24},
    "scaled": {**PLAIN, "scale_codebook_embeddings": True},
    "normed": {**PLAIN, "norm_fastlayer_input": True},
    "one head": {**PLAIN, "n_head": 1, "n_local_heads": 1, "head_dim": 2},
    "no groups": {**PLAIN, "n_local_heads": 4, "fast_n_local_heads": 4},
    "one group": {**PLAIN, "n_head": 8, "n_local_heads": 1, "rope_base": 1000000.0},
    "one codebook": {**PLAIN, "num_codebooks": 1},
    "many codebooks": {**PLAIN, "num_codebooks": 17},
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_every_switch_of_the_config(tmp_path: Path, config: dict[str, Any]) -> None:
    weights = random_weights(config)
    assert_as_the_rules_say(open_language_model(write_flat(tmp_path, config, weights), family="s2"), config, weights)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", FAMILIES)
def test_language_models_of_any_sizes(tmp_path: Path, name: str, seed: int) -> None:
    rng = np.random.default_rng([seed, *name.encode()])
    config = random_config(name, rng)
    weights = write_checkpoint(tmp_path, name, config, rng)
    source = open_language_model(tmp_path, codec=FAMILIES[name].codec)
    assert source.family.name == name
    assert (source.ids.semantic, source.ids.end) == expected_ids(name)
    assert_as_the_rules_say(source, config, weights)
    for head in ("audio", "full"):
        assert list(source.describe(head).faults()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "head"), [("s2", "audio"), ("s1", "full"), ("1.4", "audio")])
def test_graphs_of_any_sizes(tmp_path: Path, name: str, head: str) -> None:
    """Graphs equal the torch modules. Whole bundles below cover the other families."""
    rng = np.random.default_rng([*name.encode()])
    write_checkpoint(tmp_path, name, random_config(name, rng) | {"n_layer": 1, "n_fast_layer": 1}, rng)
    for job in open_language_model(tmp_path, codec=FAMILIES[name].codec).jobs(head):
        parity = job.run(tmp_path).parity
        assert parity.max_abs_error <= parity.tolerance


# ---- the codec


def random_dac(rng: np.random.Generator, *, encoder_layers: int = 0) -> dict[str, Any]:
    """Return random sizes of a DAC codec: odd channels, codebooks of any size.

    encoder_layers: of a transformer in the first block of the encoder, which is wide then.
    """
    rates = [int(rate) for rate in rng.integers(2, 5, int(rng.integers(1, 4)))]
    width = 32 if encoder_layers else int(rng.integers(3, 7))
    dim = width * 2 ** len(rates)
    transformer = {"n_layer": int(rng.integers(1, 3)), "n_head": int(rng.integers(1, 4)), "head_dim": 2 * int(rng.integers(1, 6))}
    transformer |= {"dim": dim, "intermediate_size": int(rng.integers(5, 32)), "rope_base": 500, "norm_eps": 1e-5}
    module = {"window_size": int(rng.integers(1, 6)), "input_dim": dim, "config": transformer}
    return {
        "sample_rate": int(rng.integers(4000, 48001)),
        "encoder_dim": width,
        "encoder_rates": rates,
        "decoder_dim": 2 ** len(rates) + int(rng.integers(0, 30)),
        "decoder_rates": rates[::-1],
        "encoder_transformer_layers": [encoder_layers] + [0] * (len(rates) - 1),
        "transformer_general_config": {"rope_base": 10000, "norm_eps": 1e-5},
        "quantizer": {
            "input_dim": dim,
            "n_codebooks": int(rng.integers(1, 4)),
            "codebook_size": int(rng.integers(2, 40)),
            "codebook_dim": int(rng.integers(1, 6)),
            "semantic_codebook_size": int(rng.integers(2, 60)),
            "downsample_factor": [int(factor) for factor in rng.integers(2, 4, int(rng.integers(1, 3)))],
            "pre_module": module,
            "post_module": module,
        },
    }


def random_firefly(rng: np.random.Generator, *, causal: bool) -> dict[str, Any]:
    """Return random sizes of a Firefly codec: odd channels, windows and kernels of any valid size."""
    rates = [int(rate) for rate in rng.integers(2, 5, int(rng.integers(1, 4)))]
    groups, hop = int(rng.integers(1, 4)), math.prod(rates)
    levels = [int(level) for level in rng.integers(2, 7, int(rng.integers(1, 4)))]
    dims = [int(rng.integers(3, 9)), groups * int(rng.integers(1, 5))]
    kernels = [2 * int(half) + 1 for half in rng.integers(0, 3, 2)]
    bands, window = int(rng.integers(4, 12)), hop + int(rng.integers(20, 60))
    return {
        "spec_transform": {"sample_rate": 16000, "n_mels": bands, "n_fft": window, "hop_length": hop, "win_length": window},
        "backbone": {"input_channels": bands, "depths": [int(d) for d in rng.integers(0, 3, 2)], "dims": dims, "kernel_size": 5},
        "head": {
            "hop_length": hop,
            "upsample_rates": rates,
            "upsample_kernel_sizes": [rate + (int(rng.integers(0, 5)) if causal else 2) for rate in rates],
            "resblock_kernel_sizes": kernels,
            "resblock_dilation_sizes": [[1, 2], [int(rng.integers(1, 4))]],
            "num_mels": dims[-1],
            "upsample_initial_channel": 2 ** len(rates) + int(rng.integers(0, 30)),
            "pre_conv_kernel_size": 3,
            "post_conv_kernel_size": 5,
        },
        "quantizer": {
            "input_dim": dims[-1],
            "n_codebooks": int(rng.integers(1, 3)),
            "n_groups": groups,
            "levels": levels,
            "downsample_factor": [int(factor) for factor in rng.integers(2, 4, int(rng.integers(1, 3)))],
        },
    }


def write_codec(folder: Path, kind: str, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> CodecSource:
    """Write a codec with random weights in the official layout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "codec_config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(0)
    module: Dac | Firefly
    if kind == "dac":
        module, file = Dac(DacConfig.from_json(config)), "codec.pth"
    else:
        module, file = Firefly(FireflyConfig.from_json(config, causal=kind == "firefly")), "firefly-gan-vq-fsq-x-generator.pth"
    torch.save({name: tensor.to(dtype) for name, tensor in module.state_dict().items()}, folder / file)
    return open_codec(folder)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["dac", "firefly", "centred firefly"])
def test_codecs_of_any_sizes(tmp_path: Path, kind: str, seed: int) -> None:
    """A frame is one hop of samples, and a stream equals the whole. In a causal codec, audio of a prefix is a prefix."""
    rng = np.random.default_rng([seed, len(kind)])
    config = random_dac(rng, encoder_layers=seed % 2) if kind == "dac" else random_firefly(rng, causal=kind == "firefly")
    source = write_codec(tmp_path, kind, config)
    assert source.problems() == []
    assert source.kind == kind
    described, module = source.describe(), source.module()
    assert list(described.faults()) == []
    sizes = torch.tensor(described.codebook_sizes)[:, None]
    codes = (torch.rand(1, len(sizes), 7, generator=torch.Generator().manual_seed(seed)) * sizes).long()
    positions = torch.arange(7)[None]
    samples = max(described.min_samples, 5 * described.hop)
    samples += -samples % described.sample_multiple
    with torch.no_grad():
        whole = module.decode(codes)
        assert whole.shape == (1, 1, 7 * described.hop)
        assert whole.isfinite().all()
        found = module.encode(torch.rand(1, 1, samples) - 0.5)
        assert found.shape[:2] == codes.shape[:2]
        assert (found >= 0).all()
        assert (found < sizes).all()
        if kind == "centred firefly":
            return
        carried, pieces = None, []
        for part, at in zip(codes.split([1, 4, 2], dim=2), positions.split([1, 4, 2], dim=1), strict=True):
            carry = Carry(carried, at)
            pieces.append(module.decode(part, carry))
            carried = carry.after
    assert (torch.cat(pieces, dim=2) - whole).abs().max() <= TOLERANCES["prefix"]


@pytest.mark.parametrize(
    ("kind", "channels", "widths"),
    [("dac", 72, [36, 18, 9, 4]), ("firefly", 80, [40, 20, 10, 5, 2])],
)
def test_channels_are_halved_rounding_down(kind: str, channels: int, widths: list[int]) -> None:
    """Odd channels are halved as in the original."""
    rng = np.random.default_rng(0)
    rates = [2] * len(widths)
    if kind == "dac":
        config = {**random_dac(rng), "decoder_dim": channels, "decoder_rates": rates, "encoder_rates": rates}
        config |= {"encoder_transformer_layers": [0] * 4, "encoder_dim": 4, "latent_dim": config["quantizer"]["input_dim"]}
        names = {name: tensor.shape for name, tensor in Dac(DacConfig.from_json(config)).decoder.state_dict().items()}
        found = [names[f"model.{i}.block.1.conv.weight"][1] for i in range(1, 5)]
    else:
        config = random_firefly(rng, causal=True)
        config["spec_transform"] |= {"hop_length": 32}
        config["head"] |= {"hop_length": 32, "upsample_rates": rates, "upsample_kernel_sizes": rates}
        config["head"]["upsample_initial_channel"] = channels
        names = {name: t.shape for name, t in Firefly(FireflyConfig.from_json(config, causal=True)).head.state_dict().items()}
        found = [names[f"ups.{i}.conv.weight"][1] for i in range(5)]
    assert found == widths


# ---- whole bundles


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "head"), [("1.5", "firefly", "audio"), ("1.2", "centred firefly", "full")])
def test_bundles_of_any_sizes_speak(tmp_path: Path, name: str, kind: str, head: str) -> None:
    """The export verifies every graph against its module, and loading checks the manifest."""
    rng = np.random.default_rng([*name.encode()])
    folder, out = tmp_path / "checkpoint", tmp_path / "bundle"
    source = write_codec(folder, kind, random_firefly(rng, causal=kind == "firefly"), dtype=torch.float16)
    books = len(source.config.codebook_sizes)
    config = random_config(name, rng) | {"max_seq_len": 512, "n_layer": 1, "n_fast_layer": 1, "num_codebooks": books}
    write_checkpoint(folder, name, config, rng)
    bundle = Bundle.load(export_bundle(folder, out, Options(head=head)).path)
    described, spec = bundle.manifest.codec, bundle.manifest.specs["codec_encode"]
    speech = TTS.load(out, provider="cpu", threads=1).speak("word1 word2.", seed=3, max_frames=4)
    assert speech.codes.shape[0] == books
    assert len(speech.pcm) == speech.codes.shape[1] * described.hop
    engine = open_engine(bundle.file(spec.file), spec, provider="cpu")
    for samples in (described.min_samples, *range(3 * described.hop - 1, 3 * described.hop + 2)):
        steps, factor = samples // source.config.mel_hop, described.hop // source.config.mel_hop
        frames = -(-steps // factor) if kind == "firefly" else steps // factor
        codes = engine.run({"audio": np.zeros((1, 1, samples), np.float32)})["codes"]
        assert codes.shape == (1, books, frames), samples
