"""Pieces of long texts: every word once, within tokens and window."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fishrt.diffusion.text import Pace, Variant, normalise, pieces, split, tokens
from fishrt.errors import PromptError, SamplingError

WINDOW_S, MAX_TOKENS = 29.72, 768
TAG = re.compile(r"\[S\d+\]")
PARTS = "one two, three. four! five? [S1] [S2] [S17] (aside) Dr. 3.14 U.S. - 1. … “six” it’s: — 日本語 naïve [laughs] \n \r\n"
WORDS = st.lists(
    st.sampled_from([*PARTS.split(" "), "word" * 40, "x" * 900, "[a. b]"]),
    min_size=1,
    max_size=300,
).map(" ".join)


def letters(text: str) -> str:
    """What is spoken, without the tags of speakers and without spaces."""
    return "".join(TAG.sub(" ", text).split())


def has_words(text: str) -> bool:
    return any(char.isalnum() for char in TAG.sub("", text))


@given(WORDS.filter(has_words), st.sampled_from(["official", "streaming"]))
def test_every_word_is_in_one_piece_and_every_piece_fits(text: str, variant: Variant) -> None:
    if not has_words(normalise(text, variant)):
        return
    found = split(text, WINDOW_S, MAX_TOKENS, variant=variant)
    assert letters(" ".join(found)) == letters(normalise(text, variant))
    assert all(len(tokens(piece)) <= MAX_TOKENS for piece in found)
    if variant == "official":
        pace = Pace().within(WINDOW_S)
        assert pace.max_s == pytest.approx(0.75 * WINDOW_S)
        # the tag of another speaker is not counted, and text without spaces may be cut no further
        assert all(pace.estimate(TAG.sub("", piece)) <= WINDOW_S for piece in found)


@given(WORDS.filter(has_words))
def test_every_piece_keeps_its_speaker(text: str) -> None:
    """The speaker of each letter is that of the last tag before it, in the text as in the pieces."""

    def said(parts: list[str]) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        for part in parts:
            tag = "[S1]"
            for section in re.split(r"(\[S\d+\])", part):
                tag = section if TAG.fullmatch(section) else tag
                found += [] if TAG.fullmatch(section) else [(tag, char) for char in section if not char.isspace()]
        return found

    assert said(split(text, WINDOW_S, MAX_TOKENS)) == said([normalise(text)])


def test_a_short_text_stays_as_it_is() -> None:
    assert split("(softly)  Two  words:\nhere", WINDOW_S, MAX_TOKENS) == ["(softly)  Two  words, here"]


def test_a_sentence_without_end_is_cut_at_words_into_equal_parts() -> None:
    text = "word " * 130
    found = split(text, WINDOW_S, MAX_TOKENS)
    assert sorted(TAG.sub("", piece).split().count("word") for piece in found) == [43, 43, 44]


def test_bytes_limit_pieces_too() -> None:
    found = split("日本語の文章です. " * 60, WINDOW_S, MAX_TOKENS, Pace(max_s=1000.0, target_s=1000.0))
    assert len(found) > 1
    assert all(len(tokens(piece)) <= MAX_TOKENS for piece in found)


def test_a_pace_sets_the_length_of_pieces() -> None:
    text = "Five words are in this. " * 12
    assert len(split(text, WINDOW_S, MAX_TOKENS)) == 2
    assert len(split(text, WINDOW_S, MAX_TOKENS, Pace(target_s=2.0, min_s=1.0, max_s=4.0))) == 12
    assert len(split(text, WINDOW_S, MAX_TOKENS, Pace(max_s=29.0))) == 1


def test_without_a_limit_of_tokens_the_streaming_pieces_are_sentences() -> None:
    pace = Pace(target_s=0.0, min_s=0.0, max_s=0.0).within(WINDOW_S, "streaming")
    assert pieces("[S1] " + "long " * 300 + "end. Next.", pace, None, "streaming") == [
        "[S1] " + "long " * 300 + "end.",
        "[S1] Next.",
    ]


@pytest.mark.parametrize("text", ["", "  ", "[S1]", "[S2] ...", "—"])
def test_nothing_to_speak_is_refused(text: str) -> None:
    with pytest.raises(PromptError, match="nothing to speak"):
        split(text, WINDOW_S, MAX_TOKENS)


def test_what_the_streaming_variant_drops_wholly_is_refused() -> None:
    assert split("日本", WINDOW_S, MAX_TOKENS)
    with pytest.raises(PromptError, match="nothing to speak"):
        split("日本", WINDOW_S, MAX_TOKENS, variant="streaming")


def test_brackets_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PromptError, match="cannot be split"):
        split(f"[{'very ' * 200}loud] Hello.", WINDOW_S, MAX_TOKENS)


def test_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(PromptError, match="UTF-8"):
        split("a\udcff", WINDOW_S, MAX_TOKENS)


@pytest.mark.parametrize("pace", [{"max_s": -1.0}, {"letters_per_s": float("nan")}, {"words_per_s": "2"}])
def test_a_pace_out_of_range_is_refused(pace: dict[str, float]) -> None:
    with pytest.raises(SamplingError, match="the pace has"):
        Pace(**pace)
