"""Texts that come in fragments."""

from __future__ import annotations

import pytest

from fishrt.text import growing
from fishrt.text.growing import GrowingText

TEXT = "Dr. Smith paid 3.50 for it. [laughing. very] Really?! Yes… 你好。再见。 The end"
SENTENCES = ["Dr. Smith paid 3.50 for it.", "[laughing. very] Really?!", "Yes…", "你好。", "再见。", "The end"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_sentences_come_when_they_are_whole(size: int) -> None:
    text, found = GrowingText(), []
    for start in range(0, len(TEXT), size):
        found += text.push(TEXT[start : start + size])
    assert found == SENTENCES[:-1]
    assert found + text.flush() == SENTENCES
    assert text.flush() == []


def test_a_sentence_waits_for_what_follows() -> None:
    text = GrowingText()
    assert text.push("See fishrt.") == []
    assert text.push("io now. ") == ["See fishrt.io now."]
    assert text.push(" \n") == []
    assert text.flush() == []


def test_short_sentences_come_together() -> None:
    text = GrowingText(least=10)
    assert text.push("One. Two. ") == []
    assert len(text) == 10
    assert text.push("Three. Four. ") == ["One. Two. Three."]
    assert text.flush() == ["Four."]


def test_a_sentence_keeps_its_speaker() -> None:
    text = GrowingText()
    found = text.push("<|speaker:0|>One. Two. <|spea") + text.push("ker:1|>Three. Four. ") + text.flush()
    assert found == ["<|speaker:0|>One.", "<|speaker:0|>Two.", "<|speaker:1|>Three.", "<|speaker:1|>Four."]


@pytest.mark.parametrize("fragment", ["a", "a ", "a. "])
def test_the_work_for_many_fragments_grows_with_the_length_of_the_text(fragment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at, usual = [], growing.sentence_ends

    def counted(text: str) -> list[int]:
        looked_at.append(len(text))
        return usual(text)

    monkeypatch.setattr(growing, "sentence_ends", counted)
    text, length = GrowingText(least=1_000_000), 5_000
    for _ in range(length):
        assert text.push(fragment) == []
    assert sum(looked_at) < 1000**2 + 20 * length * len(fragment)
    assert text.flush() == [(fragment * length).strip()]


def test_sentences_of_a_long_text_come_when_it_has_grown() -> None:
    text = GrowingText()
    assert text.push("a" * 1600) == []
    assert text.push(". b") == []
    assert text.push("c" * 100) == ["a" * 1600 + "."]
    assert text.push(". d") == ["b" + "c" * 100 + "."]
