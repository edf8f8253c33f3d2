from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fishrt.errors import PromptError
from fishrt.text.split import (
    before_first_turn,
    check_text,
    excerpt,
    pack_turns,
    speakable,
    speaker_turns,
    split_sentences,
    split_turn,
    with_end,
)

MARKUP = re.compile(r"\[[^\[\]]*\]|<\|[^|<>]*\|>")


def size(text: str) -> int:
    return len(text.encode())


def letters(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("text", ["", "   \n", "...!?", "。！", "\x00\x07", "—", "<|speaker:1|>", "🙂", "\u200b"])
def test_nothing_to_speak(text):
    assert not speakable(text)
    with pytest.raises(PromptError, match="nothing to speak"):
        check_text(text)


@pytest.mark.parametrize("text", ["a", "7", "你", "[laughing]", "é", "...ok..."])
def test_something_to_speak(text):
    check_text(text)


def test_surrogates_are_refused():
    with pytest.raises(PromptError, match="UTF-8"):
        check_text("abc \udcff")


def test_turns():
    text = " before <|speaker:0|> one <|speaker:12|>two\n<|speaker:x|>"
    assert speaker_turns(text) == ["<|speaker:0|> one", "<|speaker:12|>two\n<|speaker:x|>"]
    assert before_first_turn(text) == "before"
    assert before_first_turn("<|speaker:0|>x") == ""
    assert speaker_turns("no tags <|speaker:|>") == []


def test_packing_counts_turns_and_bytes():
    assert pack_turns(["aaa", "bbb", "ccc"], 2, 100) == ["aaa\nbbb", "ccc"]
    assert pack_turns(["aaa", "bbb", "ccc"], 5, 6) == ["aaa\nbbb", "ccc"]
    assert pack_turns(["too long", "b"], 5, 3) == ["too long", "b"]
    assert pack_turns(["éé", "b"], 5, 4) == ["éé", "b"], "bytes, not characters"
    assert pack_turns([], 5, 3) == []


def test_short_text_stays_as_it_is():
    assert split_sentences("  One. Two!  Three?\n", 100) == ["One. Two!  Three?"]
    assert split_sentences(" \n ", 100) == []


@pytest.mark.parametrize(
    ("text", "limit", "pieces"),
    [
        ("First one. Second one! Third?", 12, ["First one.", "Second one!", "Third?"]),
        ('He said: "Stop!" Then he went.', 18, ['He said: "Stop!"', "Then he went."]),
        ("Dr. Smith met Mrs. Jones. They spoke.", 30, ["Dr. Smith met Mrs. Jones.", "They spoke."]),
        ("It costs 3.14 dollars. Go to fish.audio now.", 25, ["It costs 3.14 dollars.", "Go to fish.audio now."]),
        ("今天天气很好。你好，世界！再见", 21, ["今天天气很好。", "你好，世界！", "再见"]),
        ("「やめて！」彼は言った。終わり", 24, ["「やめて！」", "彼は言った。", "終わり"]),
        ("यह एक है। यह दो है।", 30, ["यह एक है।", "यह दो है।"]),
        ("A title\n\nThe first paragraph", 20, ["A title", "The first paragraph"]),
        ("well, this is it, my dear friend", 20, ["well, this is it,", "my dear friend"]),
        ("alpha beta gamma delta", 11, ["alpha beta", "gamma delta"]),
        ("abcdefghij", 4, ["abcd", "efgh", "ij"]),
        ("Wait... what?! Really", 10, ["Wait...", "what?!", "Really"]),
    ],
)
def test_cuts_at_the_best_place(text, limit, pieces):
    assert split_sentences(text, limit) == pieces


def test_pieces_are_about_equal():
    sizes = [size(p) for p in split_sentences("One two three. " * 11, 150)]
    assert len(sizes) == 2
    assert max(sizes) - min(sizes) <= size("One two three. ")


def test_never_cuts_inside_markup():
    text = "Hello [whisper, in a small voice. really] there <|speaker:10|>friend. " * 6
    for limit in range(1, 80):
        pieces = split_sentences(text, limit)
        assert MARKUP.findall(" ".join(pieces)) == MARKUP.findall(text)
        assert all(len(MARKUP.findall(p)) == p.count("[") + p.count("<|") for p in pieces)


def test_never_cuts_a_character_that_is_written_as_several():
    family, accent = "👨‍👩‍👧", "e\u0301"
    for limit in (1, 5, 20, 33):
        assert all(set(re.findall(r".\u200d?", p)) and p[0] in "👨" and p[-1] == "👧" for p in split_sentences(family * 9, limit))
        assert all(not unicodedata.combining(p[0]) for p in split_sentences(accent * 30, limit))


def test_an_unclosed_bracket_is_no_markup():
    assert all(size(p) <= 12 for p in split_sentences("an [unclosed bracket goes on and on", 12))


def test_a_long_turn_repeats_its_tag():
    pieces = split_turn("<|speaker:2|>One thing. Another thing. A third thing.", 30)
    assert pieces == ["<|speaker:2|>One thing.", "<|speaker:2|>Another thing.", "<|speaker:2|>A third thing."]
    assert split_turn("<|speaker:2|>Short.", 30) == ["<|speaker:2|>Short."]
    assert split_turn("<|speaker:2|>", 30) == []


WORDS = st.text(st.sampled_from(list("ab.,!? \n。，é你🙂[]|<>\u0301'\"")), max_size=120)


@settings(max_examples=300, deadline=None)
@given(WORDS, st.integers(1, 40))
def test_no_word_is_lost_and_no_piece_too_long(text, limit):
    pieces = split_sentences(text, limit)
    assert letters("".join(pieces)) == letters(text)
    # Only what must stay whole may be longer: markup, and a character with its marks.
    whole = max([size(m) for m in MARKUP.findall(text)] + [size(m) for m in re.findall(r".\u0301*", text)] + [0])
    marked = max([size(m) for m in re.findall(r"(?:\[[^\[\]]*\]|<\|[^|<>]*\|>)\u0301*", text)] + [0])
    assert all(size(p) <= max(limit, whole, marked) for p in pieces)
    assert all(p == p.strip() and p for p in pieces)


@pytest.mark.slow
def test_long_texts_take_linear_time():
    """A hundred thousand of each: quadratic work would run for minutes here, although nothing is timed."""
    for text in ("a " * 100_000, "x" * 100_000, "." * 100_000 + "x", "[a] b" * 20_000, "[" * 100_000, "Hi there, you. " * 7_000):
        assert letters("".join(split_sentences(text, 150))) == letters(text)


ENDS = {
    ".": "Hello|Room 7|7|cafe\u0301|Привет|مرحبا|مَرْحَبًا|שָׁלוֹם|สวัสดี|வணக்கம்|안녕하세요|我喜欢 jazz"
    "|hello\u200d|hello\u200b|hello\ufeff|hello\u00ad"
    "|I \u2764\ufe0f you \u2764\ufe0f|hello 🙂|hello 👍🏽|hello 👨‍👩‍👧"
    '|He said "hello"|well (maybe)|**hello**|100%|20 °|5 €|C++|' + unicodedata.normalize("NFD", "안녕하세요"),
    "।": "नमस्ते|আমি ভালো|मैं २५|मैं 25",
    "。": "你好|第 3|こんにちは|ありがとー|ｱﾘｶﾞﾄｳ|ｈｅｌｌｏ|他说“你好”|「やめて」",
    "։": "Բարև",
    "።": "ሰላም",
    "။": "မင်္ဂလာပါ",
}
"""Texts by the full stop of their script: with combining accents, vowel signs, invisible characters, emoji, quotes and signs."""


@pytest.mark.parametrize(("end", "text"), [(end, text) for end, texts in ENDS.items() for text in texts.split("|")])
def test_a_text_without_an_end_gets_that_of_its_script(text: str, end: str) -> None:
    assert with_end(text) == text + end
    assert with_end(text + end) == text + end


ENDED = (
    "#Hello!#Hello…#Hello,#Well —#[laughing]#Hello [laughing]#Hello. [laughing] #Hello <|speaker:1|>"
    '#He said "hello!"#(Really?)#Hello! 🙂#「やめて！」#नमस्ते।#مرحبا؟#سلام۔#Hello.\u200d#🙂'
)


@pytest.mark.parametrize("text", ENDED.split("#"))
def test_a_text_with_an_end_or_without_words_stays_as_it_is(text: str) -> None:
    assert with_end(text) == text


def test_an_excerpt_fits_into_a_message() -> None:
    assert excerpt("  One\n two ") == "One two"
    assert excerpt("word " * 30, 20) == "word word word …"
    assert excerpt("x" * 99, 10) == "x" * 9 + " …"
    assert excerpt("a " + "x" * 99, 10) == "a " + "x" * 7 + " …", "cut at a space only where that leaves most of it"
