"""Cleaning and punctuation splitting with small rules; the originals' rules are in test_parity_prompt.py."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fishrt.bundle.features import PunctuationSplit, TextCleaning
from fishrt.text.clean import clean_text, lost_letters, spaced, unwrap
from fishrt.text.split import split_punctuation


def rules(**changes: Any) -> TextCleaning:
    return TextCleaning(**{"replace": {}, "keep": None, "drop": (), "collapse": "", **changes})


ASCII = rules(keep=((0, 127),))
SPLIT = PunctuationSplit(sentence_ends=".!", clause_ends=",")


@pytest.mark.parametrize(
    ("changes", "text", "cleaned"),
    [
        ({}, " a\n ", "a"),
        ({"replace": {"a": "b", "b": "c"}}, "ab", "bc"),
        ({"replace": {"..": "-", ".": "+"}}, "...", "-+"),
        ({"replace": {".": "+", "..": "-"}}, "...", "+++"),
        ({"keep": ((97, 98), (100, 100))}, "abcde", "abd"),
        ({"drop": ((98, 98), (100, 101))}, "abcde", "ac"),
        ({"keep": ((97, 100),), "drop": ((98, 98),)}, "abcde", "acd"),
        ({"collapse": ".,"}, "a,.b..c,d", "a,b.c,d"),
        ({"collapse": "]^-"}, "a]]b^-c", "a]b^c"),
        ({"replace": {"x": "."}, "drop": ((98, 98),), "collapse": "."}, "axb.", "a."),
    ],
)
def test_each_rule_and_their_order(changes: dict[str, Any], text: str, cleaned: str) -> None:
    assert clean_text(text, rules(**changes)) == cleaned


def test_letters_that_would_vanish_are_found_but_not_symbols() -> None:
    assert lost_letters("Größe ①, ☺ — größer", ASCII) == ["ö", "ß", "①"]
    assert lost_letters("5 € × 20 °", ASCII) == ["€", "×"]
    assert lost_letters("~", rules(replace={"~": ""})) == []
    assert lost_letters("Größe", rules()) == []
    assert lost_letters("abc", rules(replace={"a": "ä"}, keep=((0, 127),))) == ["a"]


@pytest.mark.parametrize(
    ("changes", "text", "result"),
    [
        ({"keep": ((0, 127),)}, "10\u201320 hi\U0001f642there \u2014 x", "10 20 hi there \u2014 x"),
        ({"replace": {"(": "", ")": ""}}, "foo(bar) baz (qux)", "foo bar) baz (qux)"),
        ({"replace": {"...": "\u2026"}, "keep": ((0, 127),)}, "Wait...what? Oh...", "Wait what? Oh..."),
        ({"replace": {"-": ","}}, "a-b", "a-b"),
    ],
)
def test_what_is_dropped_between_words_leaves_a_space(changes: dict[str, Any], text: str, result: str) -> None:
    assert spaced(text, rules(**changes)) == result


def test_lines_become_one_and_paragraphs_sentences() -> None:
    assert unwrap(" One\ntwo  three.\r\n\r\nFour\n \n\nfive! \n\nsix\n") == "One two three. Four. five! six"


@pytest.mark.parametrize(
    ("text", "limit", "pieces"),
    [
        ("One. Two, three.", 16, "One. Two, three."),
        ("One. Two, three.", 15, "One.|Two, three."),
        ("One. Two, three.", 11, "One. Two,|three."),
        ("Pi is 3.14. Yes.", 11, "Pi is 3.14.|Yes."),
        ("Pi is 3.14. Yes.", 8, "Pi is|3.14.|Yes."),
        ("äöü", 4, "äö|ü"),  # bytes are counted
        ("äöü", 3, "äö|ü"),
        ("... --- !!!", 3, ""),
        ("", 3, ""),
    ],
)
def test_cuts_after_punctuation(text: str, limit: int, pieces: str) -> None:
    assert split_punctuation(text, SPLIT, limit) == [piece for piece in pieces.split("|") if piece]


def test_rules_may_lack_characters() -> None:
    assert split_punctuation("one, two. three", PunctuationSplit("", ""), 10) == ["one, two.", "three"]


@given(st.text(alphabet="ab. ,!3ä。", max_size=80), st.integers(2, 30))
def test_every_letter_is_in_a_piece_that_fits(text: str, limit: int) -> None:
    pieces = split_punctuation(text, SPLIT, limit)
    assert [c for c in "".join(pieces) if c.isalnum()] == [c for c in text if c.isalnum()]
    assert all(len(piece.encode()) <= limit + 2 for piece in pieces)
