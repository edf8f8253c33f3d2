"""Tokenizer, splitting and prompts against those of the original implementation."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fishrt.prompt import Message, PromptBuilder
from fishrt.text import pack_turns, speaker_turns, with_end
from fishrt.tokenizer import Tokenizer
from fishrt.voices import Voice
from helpers_text import golden, language_model

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def vectors():
    return golden()


@pytest.fixture(scope="module")
def tokenizer(vectors):
    return Tokenizer.load(vectors[0] / "checkpoint/tokenizer.json")


@pytest.fixture(scope="module")
def builder(vectors, tokenizer):

    folder, meta, arrays = vectors
    config = json.loads((folder / "checkpoint/config.json").read_text())
    begin, end = meta["semantic_range"]
    model = language_model(
        num_codebooks=arrays["ref1_codes"].shape[0],
        codebook_width=config["audio_decoder_config"]["vocab_size"],
        max_seq_len=config["text_config"]["max_seq_len"],
        vocab_size=meta["vocab_size"],
        semantic_begin_id=begin,
        semantic_end_id=end,
        end_id=meta["im_end_id"],
    )
    return PromptBuilder(tokenizer, model)


def test_tokenizer_gives_the_same_ids_and_texts(vectors, tokenizer):
    cases = vectors[1]["tokenizer_cases"]
    assert cases
    for case in cases:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"], case["text"]


def test_special_tokens_and_semantic_range(vectors, tokenizer):
    meta = vectors[1]
    assert {name: tokenizer.token_id(name) for name in meta["special_tokens"]} == meta["special_tokens"]
    assert tokenizer.token_id("<|im_end|>") == meta["im_end_id"]
    begin, end = meta["semantic_range"]
    ids = [tokenizer.token_id(f"<|semantic:{n}|>") for n in range(end - begin + 1)]
    assert ids == list(range(begin, end + 1))


def test_speaker_turns(vectors):
    assert vectors[1]["speaker_split_cases"]
    for case in vectors[1]["speaker_split_cases"]:
        assert speaker_turns(case["text"]) == case["out"], case["text"]


def test_packing(vectors):
    assert vectors[1]["batch_cases"]
    for case in vectors[1]["batch_cases"]:
        assert pack_turns(case["turns"], case["max_speakers"], case["max_bytes"]) == case["out"], case


def _voices(case, arrays):
    texts = case.get("prompt_text") or []
    texts = [texts] if isinstance(texts, str) else texts
    codes = [arrays[key].astype(np.int64) for key in case.get("prompt_codes") or []]
    return [Voice(f"ref{n}", c, t, None) for n, (t, c) in enumerate(zip(texts, codes, strict=True))]


def test_every_prompt(vectors, builder):
    _, meta, arrays = vectors
    compared = 0
    for name, case in meta["prompt_cases"].items():
        voices = _voices(case, arrays)
        limit = case.get("chunk_length")
        pieces = builder.split(case["text"], upstream_compat=True, chunk_bytes=limit)
        assert [c.get("text", case["text"]) for c in case["chunks"]] == pieces, name
        conversation = builder.start(voices, upstream_compat=True)
        for chunk, (piece, expected) in enumerate(zip(pieces, case["chunks"], strict=True)):
            np.testing.assert_array_equal(conversation.user(piece), arrays[expected["prompt"]], err_msg=f"{name} {chunk}")
            compared += 1
            if chunk + 1 < len(pieces):
                conversation.assistant(arrays[f"longgen/{name}/{chunk}/codes"].astype(np.int64))
    assert compared == sum(key.startswith("prompt/") for key in arrays.files if not key.startswith("prompt/conversation/"))


def test_short_prompts_are_the_same_by_default(vectors, builder):
    """What upstream does not get wrong is not done differently: one piece that ends as a sentence does."""
    _, meta, arrays = vectors
    cases = {n: c for n, c in meta["prompt_cases"].items() if len(c["chunks"]) == 1 and "<|" not in c["text"]}
    plain = {n: c for n, c in cases.items() if with_end(c["text"]) == c["text"]}
    assert plain
    for name, case in plain.items():
        voices = _voices(case, arrays)
        (piece,) = builder.split(case["text"], chunk_bytes=10_000)
        np.testing.assert_array_equal(builder.start(voices).user(piece), arrays[case["chunks"][0]["prompt"]], err_msg=name)


def test_conversation_of_any_messages(vectors, builder):
    _, meta, arrays = vectors
    messages = [
        Message(
            role=m["role"],
            parts=tuple(arrays[p[1:]].astype(np.int64) if p.startswith("@") else p for p in m["parts"]),
            modality=m.get("modality"),
            open=not m.get("add_im_end", True),
        )
        for m in meta["conversation_case"]
    ]
    np.testing.assert_array_equal(builder.encode(messages), arrays["prompt/conversation/0"])
