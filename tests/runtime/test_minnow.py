"""The embedded voice speaks, and an independent recogniser understands it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from fishrt import TTS, Sampling
from quality import Recogniser, word_errors, words

# The first held-out sentences of benchmarks/held_out.txt. How well the voice says many is measured by
# benchmarks/minnow_quality.py; this is to notice when something breaks.
SENTENCES = {
    "slt": "Is there a painter between the trees?",
    "rms": "Information is the inverse of entropy.",
    "awb": "May you live in interesting times.",
}


@pytest.fixture(scope="module")
def tts() -> TTS:
    return TTS.load()


@pytest.fixture(scope="module")
def recognise() -> Recogniser:
    return Recogniser()


@pytest.mark.slow
def test_three_sentences_are_understood(tts: TTS, recognise: Recogniser) -> None:
    errors = 0
    for voice, text in SENTENCES.items():
        speech = tts.speak(text, voice=voice, seed=1)
        assert set(speech.info.stop_reasons) == {"end"}
        errors += word_errors(text, recognise(speech.pcm, speech.sample_rate))
    assert errors <= 0.3 * sum(len(words(text)) for text in SENTENCES.values())


@pytest.mark.slow
def test_recogniser_hears_nothing_of_a_sentence_in_another(tts: TTS, recognise: Recogniser) -> None:
    """The test above can fail: another sentence has errors."""
    speech = tts.speak(SENTENCES["slt"], voice="slt", seed=1)
    wrong = SENTENCES["awb"]
    assert word_errors(wrong, recognise(speech.pcm, speech.sample_rate)) > 0.5 * len(words(wrong))


def test_what_make_speak_says_is_understood(tts: TTS, recognise: Recogniser) -> None:
    """With its seed, no word is wrong on the CPU where it was chosen; another CPU may round differently."""
    makefile = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
    text, seed = (re.search(rf"^{name} *\?= (.+)$", makefile, re.MULTILINE)[1] for name in ("TEXT", "SEED"))  # type: ignore[index]
    speech = tts.speak(text, seed=int(seed))
    assert speech.info.voices == ("awb",)
    assert word_errors(text, recognise(speech.pcm, speech.sample_rate)) <= 2


def test_same_seed_same_codes(tts: TTS) -> None:
    first, again, other = (tts.speak("Good morning.", seed=seed).codes for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_speaker_tags_choose_the_voice(tts: TTS) -> None:
    """Without a given voice, the tags select the built-in voices in their order."""
    names = tts.bundle.manifest.voices.ordered  # type: ignore[union-attr]
    plain = tts.speak("<|speaker:1|>Good morning.", seed=3, sampling=Sampling(temperature=0.5, top_p=0.5, top_k=10))
    given = tts.speak(
        "<|speaker:1|>Good morning.", seed=3, voice=list(names), sampling=Sampling(temperature=0.5, top_p=0.5, top_k=10)
    )
    assert np.array_equal(plain.codes, given.codes)
