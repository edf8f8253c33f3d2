"""Helpers for tests of text, prompts, voices and commands: golden vectors, a small tokenizer, bundles without real graphs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fishrt.bundle.features import Codec, DecodeContext, LanguageModel, SamplingDefaults
from fishrt.bundle.folder import Bundle, describe_files
from fishrt.bundle.manifest import MANIFEST, ROLES, SCHEMA, Graph, Licence, Manifest, Voices
from fishrt.language_model.sampling import Sampling, sample
from fishrt.text.tokenizer import Tokenizer
from fishrt.voices.store import VoiceStore
from fishrt.voices.voice import Voice
from fishrt_engines.engine import GraphSpec, StatePair, TensorSpec

OWN_GOLDEN = Path(__file__).parents[1] / "golden"
TINY_TOKENIZER = OWN_GOLDEN / "s2-pro/lm/checkpoint/tokenizer.json"
FINGERPRINT = "a1b2c3d4" * 8


def golden(tag: str = "s2-pro") -> tuple[Path, dict[str, Any], Any]:
    """Return folder, meta and arrays of the language model's vectors."""
    folder = Path(os.environ.get("FISHRT_GOLDEN", OWN_GOLDEN)) / tag / "lm"
    return folder, json.loads((folder / "meta.json").read_text(encoding="utf-8")), np.load(folder / "vectors.npz")


def language_model(**changes: Any) -> LanguageModel:
    """Return a language model with the sizes of the small tokenizer."""
    tokenizer = Tokenizer.load(TINY_TOKENIZER)
    values: dict[str, Any] = {
        "kind": "dual_ar",
        "num_codebooks": 4,
        "codebook_width": 160,
        "max_seq_len": 1024,
        "max_prompt": 512,
        "history_window": None,
        "main_tokens": "audio",
        "code_zero": "main",
        "code_offset": 0,
        "fast_candidates": changes.get("codebook_width", 160),
        "zero_codes_off_audio": False,
        "cleaning": None,
        "splitting": None,
        "upstream_trim": "last",
        "head": "audio",
        "vocab_size": 640,
        "semantic_begin_id": tokenizer.token_id("<|semantic:0|>"),
        "semantic_end_id": tokenizer.token_id("<|semantic:159|>"),
        "end_id": tokenizer.token_id("<|im_end|>"),
        "prompt_dialect": "conversation",
        "chunk_bytes": 80,
        "sampling": SamplingDefaults(temperature=1.0, top_p=0.9, top_k=30, repetition_aware=None, repetition_penalty=None),
    }
    return LanguageModel(**{**values, **changes})


def drawn(codes: np.ndarray, lm: LanguageModel) -> np.ndarray:
    """Return the columns int64 [1 + C, frames + 1] that a model draws for codes and the end token after them."""
    main = lm.semantic_begin_id + (codes[:1] if lm.code_zero == "main" else 0 * codes[:1])
    columns = np.concatenate((main, codes + lm.code_offset)).astype(np.int64)
    end = np.full((len(columns), 1), lm.code_offset + 1)
    end[0] = lm.end_id
    return np.concatenate((columns, end), axis=1)


def described(specs: dict[str, GraphSpec]) -> dict[str, Graph]:
    """Return the manifest's entries of portable graphs."""
    return {role: Graph(spec, "fp32", memory=1000) for role, spec in specs.items()}


def manifest(**changes: Any) -> Manifest:
    spec = GraphSpec(
        "slow_ar.onnx",
        inputs=(
            TensorSpec("prompt", "int64", ("batch", 5, "length")),
            TensorSpec("key_cache.0", "float32", ("batch", 2, "cache", 8)),
        ),
        outputs=(
            TensorSpec("logits", "float32", ("batch", 161)),
            TensorSpec("key_cache_out.0", "float32", ("batch", 2, "cache", 8)),
        ),
        states=(StatePair("key_cache.0", "key_cache_out.0"),),
    )
    codes = TensorSpec("codes", "int64", ("batch", 4, "frames"))
    graphs = {
        "slow_ar": spec,
        "fast_ar": replace(spec, outputs=(TensorSpec("logits", "float32", ("batch", 160)), *spec.outputs[1:])),
        "codec_encode": GraphSpec("", (), (codes,)),
        "codec_decode": GraphSpec("", (codes,), ()),
    }
    values: dict[str, Any] = {
        "schema": SCHEMA,
        "name": "test",
        "exported_by": "fishrt test",
        "family": "test",
        "recipe": "fp32",
        "model": language_model(),
        "codec": Codec(
            sample_rate=16000,
            hop=640,
            codebook_sizes=(160, 160, 160, 160),
            max_frames=500,
            min_samples=1,
            sample_multiple=640,
            context=DecodeContext(left=0, ahead=0),
            fingerprint=FINGERPRINT,
        ),
        "tokenizer": "tokenizer.json",
        "graphs": described({role: replace(graphs[role], file=f"{role}.onnx") for role in ROLES["dual_ar"]}),
        "quantisation": None,
        "licence": Licence("Apache-2.0", None),
        "voices": None,
        "files": {},
    }
    made = Manifest(**{**values, **changes})
    return made.sealed(made.files)


def bundle_folder(folder: Path, *, voices: Iterable[Voice] = (), **changes: Any) -> Bundle:
    """Write a bundle that loads and verifies, although its graphs cannot run. changes: of the manifest."""
    voices = tuple(voices)
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes(TINY_TOKENIZER.read_bytes())
    for spec in manifest(**changes).specs.values():
        (folder / spec.file).write_bytes(b"not a graph")
    for voice in voices:
        VoiceStore(folder / "voices").add(voice)
    names = tuple(voice.name for voice in voices)
    values: dict[str, Any] = {"voices": Voices(names[0], names) if names else None, "files": describe_files(folder)}
    (folder / MANIFEST).write_text(manifest(**{**values, **changes}).to_json(), encoding="utf-8")
    return Bundle.load(folder)


def listed(folder: Path, bundle: Bundle) -> Bundle:
    """Return the bundle with a manifest of its present files."""
    manifest = bundle.manifest.sealed(describe_files(folder))
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return Bundle.load(folder)


def voice(name: str = "anna", transcript: str = "The quick brown fox.", frames: int = 6, **changes: Any) -> Voice:
    values: dict[str, Any] = {
        "name": name,
        "codes": np.arange(4 * frames, dtype=np.int64).reshape(4, frames),
        "transcript": transcript,
        "fingerprint": FINGERPRINT,
    }
    return Voice(**{**values, **changes})


def filtered(logits: np.ndarray, temperature: float, top_p: float, top_k: int | None) -> np.ndarray:
    """Return probabilities float32 [n]: 0 for entries that `sample` never draws, even with noise in their favour."""
    sampling, drawn = Sampling(temperature, top_p, top_k), np.zeros(len(logits), bool)
    for n in range(len(logits)):
        noise = np.full(len(logits), 1e30, np.float32)
        noise[n] = 1e-8
        drawn[n] = sample(logits, sampling, noise) == n
    weights = np.where(drawn, np.exp((logits - logits.max()) / np.float32(temperature)), np.float32(0))
    return weights / weights.sum()
