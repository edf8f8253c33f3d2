from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from fishrt.bundle import features
from fishrt.bundle.features import USUAL, PunctuationSplit, Quirks, TextCleaning
from fishrt.errors import PromptError, VoiceError
from fishrt.language_model.prompt import DIALECTS, PromptBuilder
from fishrt.text.tokenizer import Tokenizer
from helpers_text import TINY_TOKENIZER, drawn, language_model, voice

TOKENIZER = Tokenizer.load(TINY_TOKENIZER)
MODEL = language_model()
COMPAT = Quirks(text=True, history=True)


@pytest.fixture
def builder():
    return PromptBuilder(TOKENIZER, MODEL)


def spell(prompt: np.ndarray) -> str:
    """A prompt as text; each frame is #."""
    text, ids = "", []
    for token in prompt[0]:
        if MODEL.semantic_begin_id <= token <= MODEL.semantic_end_id:
            text += TOKENIZER.decode(ids) + "#"
            ids = []
        else:
            ids.append(int(token))
    return text + TOKENIZER.decode(ids)


def test_without_voice(builder):
    prompt = builder.start().user("Hi.")
    assert spell(prompt) == (
        "<|im_start|>system\nconvert the provided text to speech<|im_end|>\n"
        "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n<|voice|>"
    )
    assert prompt.dtype == np.int64
    assert prompt.shape[0] == 1 + MODEL.num_codebooks
    assert not prompt[1:].any()


def test_with_voices(builder):
    first, second = voice("a", "One.", 2), voice("b", "<|speaker:4|>Two.", 3)
    prompt = builder.start([first, second]).user("Hi.")
    assert spell(prompt).startswith(
        "<|im_start|>system\nconvert the provided text to speech reference to the following:\n\n"
        "Text:\n<|speaker:0|>One.\n<|speaker:4|>Two.\n\nSpeech:\n#####<|im_end|>\n<|im_start|>user\nHi."
    )
    frames = prompt[:, (prompt[0] >= MODEL.semantic_begin_id) & (prompt[0] <= MODEL.semantic_end_id)]
    codes = np.concatenate([first.codes, second.codes], axis=1)
    np.testing.assert_array_equal(frames[1:], codes)
    np.testing.assert_array_equal(frames[0], codes[0] + MODEL.semantic_begin_id)


def test_an_untagged_transcript_gets_its_own_index(builder):
    prompt = builder.start([voice("a", "<|speaker:1|>One."), voice("b", "Two.")]).user("Hi.")
    assert "Text:\n<|speaker:1|>One.\n<|speaker:1|>Two.\n" in spell(prompt)


def test_system_text(builder):
    assert spell(builder.start(system="Be kind.").user("Hi.")).startswith(
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"
    )
    assert spell(builder.start([voice()], "Be kind.").user("Hi.")).startswith(
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>system\nconvert the provided text to speech reference to"
    )
    with pytest.raises(PromptError, match="system text is empty"):
        builder.start(system="  ")


def test_what_was_said_is_remembered(builder):
    conversation = builder.start()
    first = conversation.user("One.")
    codes = np.full((4, 3), 7)
    conversation.assistant(drawn(codes, MODEL))
    second = conversation.user("Two.")
    np.testing.assert_array_equal(second[:, : first.shape[1]], first)
    assert (
        spell(second[:, first.shape[1] :]) == "###<|im_end|>\n<|im_start|>user\nTwo.<|im_end|>\n<|im_start|>assistant\n<|voice|>"
    )
    np.testing.assert_array_equal(second[1:, first.shape[1] : first.shape[1] + 3], codes)


def test_an_answer_without_frames_is_not_remembered(builder):
    conversation = builder.start()
    conversation.user("One.")
    conversation.assistant(drawn(np.zeros((4, 0), np.int64), MODEL))
    assert "One." not in spell(conversation.user("Two."))


def test_the_oldest_is_forgotten_first_and_never_the_voice(builder):
    conversation = builder.start([voice()])
    for n in range(8):
        prompt = conversation.user(f"Number {n}.")
        assert prompt.shape[1] <= builder.model.max_prompt
        conversation.assistant(drawn(np.zeros((4, 90), np.int64), MODEL))
    text = spell(prompt)
    assert "Text:\n<|speaker:0|>The quick brown fox." in text
    assert "Number 0." not in text
    assert "Number 6." in text
    assert text.index("Number 5.") < text.index("Number 6.") < text.index("Number 7.")


def test_upstream_forgets_nothing_and_gives_up(builder):
    conversation = builder.start(quirks=COMPAT)
    for _ in range(5):
        conversation.user("Well.")
        conversation.assistant(drawn(np.zeros((4, 90), np.int64), MODEL))
    with pytest.raises(PromptError, match="too long"):
        conversation.user("Well.")


def test_too_long_a_prompt_tells_the_figures(builder):
    with pytest.raises(PromptError, match=r"earlier pieces 0\), but the model takes 512"):
        builder.start([voice(frames=39, codes=np.zeros((4, 600), np.int64))]).user("Hi.")
    limit = builder.model.max_prompt
    fixed = builder.start().user("").shape[1]
    assert builder.start().user("a" * (limit - fixed)).shape[1] == limit
    with pytest.raises(PromptError):
        builder.start().user("a" * (limit - fixed + 1))


@pytest.mark.parametrize("bad", ["<|im_end|>", "<|im_start|>", "<|semantic:3|>", "<|voice|>"])
def test_control_tokens_do_not_act(builder, bad):
    with pytest.raises(PromptError, match=bad.replace("|", r"\|")):
        builder.split(f"Hello {bad} you.")
    with pytest.raises(PromptError, match="transcript"):
        builder.start([voice(transcript=f"a {bad}")])
    with pytest.raises(PromptError, match="system"):
        builder.start(system=bad)
    assert builder.split(f"Hello {bad} you.", quirks=COMPAT) == [f"Hello {bad} you."]
    assert builder.split("Hello <|not_a_token|> you.") == ["Hello <|not_a_token|> you."]


def test_split_of_untagged_text(builder):
    text = "This is a sentence of some length, is it not? " * 5
    pieces = builder.split(text)
    assert len(pieces) == 5
    assert " ".join(pieces) == text.strip()
    assert builder.split(text, quirks=COMPAT) == [text]
    assert builder.split(text, chunk_bytes=1000) == [text.strip()]


def test_split_of_turns(builder):
    text = "Before. <|speaker:0|>One. <|speaker:1|>Two. <|speaker:0|>" + "A long turn of words. " * 5
    assert builder.split(text) == [
        "<|speaker:0|>Before.\n<|speaker:0|>One.\n<|speaker:1|>Two.",
        "<|speaker:0|>A long turn of words. A long turn of words.",
        "<|speaker:0|>A long turn of words. A long turn of words. A long turn of words.",
    ]
    assert "Before" not in "".join(builder.split(text, quirks=COMPAT))


def test_at_most_five_turns(builder):
    pieces = builder.split("<|speaker:0|>a<|speaker:1|>b" * 3)
    assert [p.count("<|speaker") for p in pieces] == [5, 1]


def test_turns_with_nothing_to_speak_are_left_out(builder):
    assert builder.split("... <|speaker:0|><|speaker:1|>Yes.<|speaker:0|> — ") == ["<|speaker:1|>Yes."]
    (piece,) = builder.split("-" * 200 + "\n\nYes.")
    assert piece.endswith("Yes.")


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("text", ["", " \n", "?!", "<|speaker:0|>"])
def test_nothing_to_speak(builder, text, compat):
    with pytest.raises(PromptError, match="nothing to speak"):
        builder.split(text, quirks=COMPAT if compat else USUAL)


def test_tags_reach_the_model(builder):
    (piece,) = builder.split("[excited] Oh! [laughing tone] Yes.")
    assert "user\n[excited] Oh! [laughing tone] Yes.<|im_end|>" in spell(builder.start().user(piece))


@pytest.mark.parametrize(
    "codes",
    [np.zeros((3, 5), np.int64), np.zeros((5, 5), np.int64), np.full((4, 5), 160), np.full((4, 5), -1), np.zeros(4, np.int64)],
    ids=["few rows", "many rows", "too large", "negative", "one dimension"],
)
def test_codes_of_another_model(builder, codes):
    with pytest.raises(VoiceError):
        builder.start([dataclasses.replace(voice(), codes=codes)])


def test_code_0_is_bounded_by_the_semantic_ids():
    builder = PromptBuilder(TOKENIZER, language_model(codebook_width=500, semantic_end_id=MODEL.semantic_begin_id + 9))
    codes = np.full((4, 2), 400)
    codes[0] = 9
    builder.start([voice(codes=codes)])
    codes[0] = 10
    with pytest.raises(VoiceError, match="0 to 9"):
        builder.start([voice(codes=codes)])


def of(dialect: str, **changes: Any) -> PromptBuilder:
    return PromptBuilder(TOKENIZER, language_model(prompt_dialect=dialect, **changes))


OWN_CODES = {"code_zero": "fast", "code_offset": 1, "semantic_end_id": MODEL.semantic_begin_id}
LAYOUTS = {
    "instruction": (
        "<|im_start|>system\nSpeak out the provided text.<|im_end|>",
        "<|im_start|>user\n{}<|im_end|><|im_start|>assistant\n<|voice|>",
    ),
    "segments": ("", "<|im_start|>user\n{}<|im_end|><|im_start|>assistant\n"),
    "interleaved": ("<|interleave|>", "<|speaker:0|>{}"),
}


@pytest.mark.parametrize("dialect", LAYOUTS)
def test_voices_and_earlier_pieces_stand_in_front_alike(dialect):
    opening, asked = LAYOUTS[dialect]
    builder = of(dialect)
    conversation = builder.start([voice("a", "One.", 2), voice("b", "Two.", 3)])
    head = opening + asked.format("One.") + "##<|im_end|>" + asked.format("Two.") + "###<|im_end|>"
    assert spell(conversation.user("Three.")) == head + asked.format("Three.")
    conversation.assistant(drawn(np.full((4, 1), 7), builder.model))
    prompt = conversation.user("Four.")
    assert spell(prompt) == head + asked.format("Three.") + "#<|im_end|>" + asked.format("Four.")
    assert not prompt[1:, prompt[0] == builder.model.end_id].any()
    assert spell(of(dialect).start().user("Hi.")) == opening + asked.format("Hi.")


@pytest.mark.parametrize("dialect", LAYOUTS)
def test_stored_codes_have_an_offset_and_may_share_one_token(dialect):
    builder = of(dialect, **OWN_CODES)
    prompt = builder.start([voice(frames=3)]).user("Hi.")
    frames = prompt[:, prompt[0] == MODEL.semantic_begin_id]
    np.testing.assert_array_equal(frames[1:], voice(frames=3).codes + 1)
    builder.start([voice(codes=np.full((4, 2), 158))])
    with pytest.raises(VoiceError, match="159 in codebook 0, which has the entries 0 to 158"):
        builder.start([voice(codes=np.full((4, 2), 159))])


@pytest.mark.parametrize("dialect", LAYOUTS)
def test_the_oldest_piece_is_forgotten_first_in_each_dialect(dialect):
    builder = of(dialect, **OWN_CODES)
    conversation = builder.start([voice()])
    for n in range(8):
        prompt = conversation.user(f"Number {n}.")
        assert prompt.shape[1] <= builder.model.max_prompt
        conversation.assistant(drawn(np.zeros((4, 90), np.int64), builder.model))
    text = spell(prompt)
    assert "The quick brown fox." in text
    assert "Number 0." not in text
    assert text.index("Number 5.") < text.index("Number 6.") < text.index("Number 7.")


@pytest.mark.parametrize(("dialect", "last"), [("segments", 3), ("instruction", 4)])
def test_upstream_remembers_columns_as_they_were_drawn(dialect, last):
    builder = of(dialect, **OWN_CODES, history_window=512)
    conversation = builder.start(quirks=COMPAT)
    first = conversation.user("One.")
    np.testing.assert_array_equal(conversation.user("One."), first)
    columns = drawn(np.full((4, 3), 7), builder.model)
    conversation.assistant(columns)
    second = conversation.user("Two.")
    np.testing.assert_array_equal(second[:, first.shape[1] : first.shape[1] + last], columns[:, :last])
    assert spell(second[:, first.shape[1] + last :]) == LAYOUTS[dialect][1].format("Two.")


def test_upstreams_window_goes_beyond_the_limit_and_never_gives_up():
    builder = of("segments", **OWN_CODES, history_window=40)
    conversation = builder.start(quirks=COMPAT)
    for n in range(4):
        prompt = conversation.user(f"Number {n}.")
        conversation.assistant(drawn(np.zeros((4, 90), np.int64), builder.model))
    # Not even the newest fits twice into 40 columns, so that all elements follow the first two.
    assert [spell(prompt).count(f"Number {n}.") for n in range(4)] == [2, 1, 1, 1]
    assert prompt.shape[1] > 400


@pytest.mark.parametrize("dialect", LAYOUTS)
def test_without_turns_there_are_no_tags_and_no_system_text(dialect):
    builder = of(dialect)
    with pytest.raises(PromptError, match="no turns of speakers"):
        builder.split("<|speaker:0|>Hello.")
    with pytest.raises(PromptError, match=r"voice 0 \('anna'\).*no turns of speakers"):
        builder.start([voice(transcript="<|speaker:0|>Hello.")])
    with pytest.raises(PromptError, match="no system text"):
        builder.start(system="Be kind.")
    assert builder.split("<|speaker:0|>Hello.<|speaker:1|>Yes.", quirks=COMPAT) == ["<|speaker:0|>Hello.<|speaker:1|>Yes."]


def test_long_text_without_turns_is_split_but_not_by_upstream():
    text = "This is a sentence of some length, is it not? " * 5
    assert len(of("interleaved").split(text)) == 5
    assert of("interleaved").split(text, quirks=COMPAT) == [text]


CLEANING = TextCleaning(
    replace={"\n": "", "[": "", "]": "", "’": "'"}, keep=((0, 127), (0x1F600, 0x1F64F)), drop=((0x1F600, 0x1F64F),), collapse=""
)
CLEANED = {"cleaning": CLEANING, "splitting": PunctuationSplit(".!?", ",")}


def test_pieces_and_transcripts_are_cleaned():
    builder = of("instruction", **CLEANED)
    assert builder.split(" [Oh] it’s\nme 🙂 ") == ["Oh it's me."]
    assert builder.split(" [Oh] it’s\nme 🙂 ", quirks=COMPAT) == ["Oh it'sme"]
    assert "user\nOh it's me<|im_end|>" in spell(builder.start([voice(transcript="[Oh] it’s\nme")]).user("Hi."))
    assert "user\nOh it'sme<|im_end|>" in spell(builder.start([voice(transcript="[Oh] it’s\nme")], quirks=COMPAT).user("Hi."))


def test_long_text_is_split_as_the_model_says():
    builder = of("instruction", **CLEANED, chunk_bytes=20)
    text = "One, two, three. Four!!! — Five six seven eight nine ten 3.14."
    with pytest.raises(PromptError, match="nothing to speak"):
        builder.split("— 🙂")
    assert builder.split(text) == ["One, two, three.", "Four!!!  Five six.", "seven eight nine.", "ten 3.14."]
    assert builder.split(text, quirks=COMPAT) == ["One, two, three.", "Four!!!  Five six", "seven eight nine", "ten 3.14."]


def test_letters_that_cleaning_would_drop_are_refused():
    builder = of("instruction", **CLEANED)
    with pytest.raises(PromptError, match="the text has ö, ß, which this model was not taught"):
        builder.split("Größer")
    with pytest.raises(PromptError, match="transcript of voice 0"):
        builder.start([voice(transcript="Größer")])
    assert builder.split("Größer", quirks=COMPAT) == ["Grer"]
    with pytest.raises(PromptError, match="nothing to speak"):
        builder.split("öß", quirks=COMPAT)


def test_cleaning_leaves_nothing_out_and_joins_nothing():
    builder = of("instruction", **CLEANED)
    assert builder.split("Pages 10\u201320, foo[bar] and hi\U0001f642there.") == ["Pages 10 20, foo bar and hi there."]
    with pytest.raises(PromptError, match="the text has €, ①, which"):
        builder.split("It costs € 5 ①.")
    with pytest.raises(PromptError, match="the text has 不, which"):  # a compatibility ideograph, which is 不 otherwise written
        builder.split("No \uf967.")
    with pytest.raises(PromptError, match=r"transcript of voice 0 .* nothing to speak"):
        builder.start([voice(transcript="\U0001f642")])


def test_the_stop_that_is_added_is_cleaned_too():
    cleaning = TextCleaning(replace={"。": "."}, keep=((0, 127), (0x4E00, 0x9FFF)), drop=(), collapse="")
    builder = of("segments", cleaning=cleaning, splitting=PunctuationSplit(".!?", ","))
    assert builder.split("你好") == ["你好."]


def test_cleaning_makes_no_control_token_act():
    with pytest.raises(PromptError, match=r"<\|im_end\|>"):
        of("instruction", **CLEANED).split("Hello <[|]im_end|> you.")


def test_every_dialect_of_the_manifest_is_known():
    assert DIALECTS.keys() == set(features.DIALECTS)


def test_texts_that_cannot_fit_are_refused_before_their_tokens_are_counted(builder, monkeypatch):
    monkeypatch.setattr(builder._tokenizer, "encode", lambda text: pytest.fail("the text is tokenised"))
    long = "a " * 32 * builder.model.max_prompt + "a"
    for refused in (
        lambda: builder.start(system=long),
        lambda: builder.start([dataclasses.replace(voice(), transcript=long)]),
        lambda: builder.check_transcript(long, "the transcript"),
    ):
        with pytest.raises(PromptError, match="is too long"):
            refused()
