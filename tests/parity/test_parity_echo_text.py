"""Normalisation, tokens, sentences and pieces of the diffusion model, against the original code and its streaming server."""

from __future__ import annotations

from typing import Any

import pytest

from echo_vectors import texts
from fishrt.diffusion.text import Pace, normalise, pieces, sentences, tokens

pytestmark = pytest.mark.parity
SETTINGS = {
    "target_seconds": "target_s",
    "min_seconds": "min_s",
    "max_seconds": "max_s",
    "chars_per_second": "letters_per_s",
    "words_per_second": "words_per_s",
}


def cases(kind: str) -> list[Any]:
    found = texts()[kind]
    assert found
    return list(found)


def test_normalisation_and_tokens() -> None:
    for case in cases("tokenizer_cases"):
        assert normalise(case["raw"]) == case["normalized"]
        assert tokens(normalise(case["raw"])).tolist() == case["ids"]
        assert tokens(case["raw"]).tolist() == case["ids_no_normalize"]


def test_tokens_of_a_batch_are_those_of_each_text_before_the_padding() -> None:
    """The original cuts off what is longer than the batch's width, which ours never does."""
    for case in cases("batch_cases"):
        for text, ids, mask in zip(case["texts"], case["ids"], case["mask"], strict=True):
            ours, width = tokens(normalise(text)).tolist(), len(ids)
            assert ours[:width] == ids[: sum(mask)]
            assert sum(mask) == min(width, len(ours))


def test_normalisation_of_the_streaming_server() -> None:
    for raw, wanted in cases("stream_preprocess_cases"):
        assert normalise(raw, "streaming") == wanted


def test_sentences() -> None:
    for text, wanted in cases("stream_sentence_cases"):
        assert sentences(text) == wanted


def test_estimates() -> None:
    for text, letters, words, seconds in cases("stream_estimate_cases"):
        assert Pace(letters_per_s=letters, words_per_s=words).estimate(text) == pytest.approx(seconds, rel=1e-12)


def test_pieces_of_the_streaming_server() -> None:
    """Without the limit of tokens, which it does not know when it makes them."""
    for case in cases("stream_chunk_cases"):
        pace = Pace(**{SETTINGS[name]: value for name, value in case["params"].items()}).within(29.7, "streaming")
        assert pieces(normalise(case["text"], "streaming"), pace, None, "streaming") == case["chunks"]
