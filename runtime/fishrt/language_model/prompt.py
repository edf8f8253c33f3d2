"""Text and voices → the prompt int64 [1 + num_codebooks, T]. The only file that knows `<|im_start|>`.

A prompt is a head, then the text and the speech of each earlier piece, then the text of this piece. The model continues with the
speech of this piece. The form depends on the dialect:

    conversation   head: a system message, with the text and speech of all voices in it
                   user: text    assistant: <|voice|>speech
    instruction    head: a system message, then each voice as if it were an earlier piece
                   user: text    assistant: <|voice|>speech
    segments       head: each voice as if it were an earlier piece
                   user: text    assistant: speech
    interleaved    head: <|interleave|>, then each voice as if it were an earlier piece
                   <|speaker:0|>text    speech

Row 0 holds token ids. The id of a frame is `semantic_begin_id + code 0`, or `semantic_begin_id` if code 0 is not part of the main
token. Rows 1… hold the codes of a frame + `code_offset`, and 0 below text. Every part is tokenised by itself: the ids depend on
the borders between parts.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..arrays import Ints
from ..bundle.features import USUAL, LanguageModel, Quirks
from ..codec import check_entries
from ..errors import PromptError, VoiceError
from ..text.clean import clean_text, lost_letters, spaced, unwrap
from ..text.split import (
    MAX_TURNS,
    SPEAKER,
    before_first_turn,
    check_text,
    check_unicode,
    pack_turns,
    speakable,
    speaker_turns,
    split_punctuation,
    split_sentences,
    split_turn,
    with_end,
)
from ..text.tokenizer import Tokenizer
from ..voices.voice import Voice

_TOKEN_CHARACTERS = 64
"""More characters than the tokens of a text have on average. To count the tokens of a text takes many times its memory."""
Parts = list[str | Ints]
"""Parts of a prompt: texts, and codes int64 [num_codebooks, frames]."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """The form of the prompts that a model was trained on."""

    opening: tuple[str, ...]
    """Parts at the start of the head."""
    ask: tuple[str, ...]
    """Parts in front of speech; {} stands for its text."""
    end: str
    """The part after speech."""
    turns: bool = False
    """Whether the text may have turns of several speakers, where voice i is speaker i, and the system message can be replaced."""
    not_remembered: int = 0
    """Number of last columns of speech that the original leaves out of later prompts; see `WindowedConversation`."""

    def asked(self, text: str) -> Parts:
        """Return the parts in front of the speech of a text."""
        return [part.replace("{}", text) for part in self.ask]

    def said(self, text: str, codes: Ints) -> Parts:
        """Return the parts of a text that has been spoken, and of its speech, codes int64 [num_codebooks, frames]."""
        return [*self.asked(text), codes, self.end]


DIALECTS = {
    "conversation": Dialect(
        opening=("<|im_start|>system\n", "convert the provided text to speech", "<|im_end|>\n"),
        ask=("<|im_start|>user\n", "{}", "<|im_end|>\n", "<|im_start|>assistant\n<|voice|>"),
        end="<|im_end|>\n",
        turns=True,
    ),
    "instruction": Dialect(
        opening=("<|im_start|>system\n", "Speak out the provided text.", "<|im_end|>"),
        ask=("<|im_start|>user\n", "{}", "<|im_end|>", "<|im_start|>assistant\n<|voice|>"),
        end="<|im_end|>",
    ),
    "segments": Dialect(
        opening=(), ask=("<|im_start|>user\n{}<|im_end|><|im_start|>assistant\n",), end="<|im_end|>", not_remembered=1
    ),
    "interleaved": Dialect(opening=("<|interleave|>",), ask=("<|speaker:0|>", "{}"), end="<|im_end|>"),
}


class PromptBuilder:
    """Builder of the prompts of one language model."""

    def __init__(self, tokenizer: Tokenizer, language_model: LanguageModel) -> None:
        self._tokenizer = tokenizer
        self.model = language_model
        self.dialect = DIALECTS[language_model.prompt_dialect]

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, without those around it."""
        return len(self._tokenizer.encode(text))

    def split(self, text: str, *, quirks: Quirks = USUAL, chunk_bytes: int | None = None) -> list[str]:
        """Return the pieces of a text that are spoken one after the other; `chunk_bytes` (UTF-8) defaults to the manifest's.

        The pieces are cleaned by the model's rules, which turn line breaks into spaces. Text that is too long is split by the
        model's `splitting`, else at sentence ends. Turns of speakers are packed into pieces of at most five turns and
        `chunk_bytes`; each part of a turn that is too long repeats its tag. Text before the first tag is speaker 0's. Pieces
        without a letter or digit are left out. A piece or turn that ends in a letter or digit gets a full stop.

        quirks: of text; text before the first tag is dropped; no turn is split and no full stop is added; text without tags is
        one piece of any length, unless there is a `splitting`; letters that the model was not trained on are dropped; control
        tokens in the text act.

        Raises PromptError for text with nothing to speak, lone surrogates, control tokens, letters that cleaning would drop, or
        speaker tags that the dialect does not have.
        """
        model = self.model
        limit = model.chunk_bytes if chunk_bytes is None else chunk_bytes
        text = self._prepare(text, "the text", quirks)
        check_text(text)
        turns = speaker_turns(text) if self.dialect.turns else []
        if quirks.text:
            if turns:
                return pack_turns(turns, MAX_TURNS, limit)
            pieces = [text] if model.splitting is None else split_punctuation(text, model.splitting, limit)
            return [self._cleaned(piece) for piece in pieces]  # once more, as upstream does
        if first := before_first_turn(text) if turns else "":
            turns = [f"<|speaker:0|>{first}", *turns]
        if turns:
            parts = [with_end(part) for turn in turns for part in split_turn(turn, limit) if speakable(part)]
            return pack_turns(parts, MAX_TURNS, limit)
        pieces = split_sentences(text, limit) if model.splitting is None else split_punctuation(text, model.splitting, limit)
        return [self._cleaned(with_end(piece)) for piece in pieces if speakable(piece)]

    def start(self, voices: Sequence[Voice] = (), system: str | None = None, *, quirks: Quirks = USUAL) -> Conversation:
        """Begin a conversation in which voice i speaks as `<|speaker:i|>`; without turns, all voices are one speaker.

        `system` replaces the usual instruction. With voices, it is a separate message in front, because the message with the
        voices keeps the words that the model was trained on. Raises VoiceError for codes that are not this model's, PromptError
        for bad text, or a system text if the dialect has no such message.
        """
        dialect = self.dialect
        texts = []
        for n, voice in enumerate(voices):
            self._check_codes(voice.codes, f"voice {voice.name!r}")
            texts.append(self._prepare_whole(voice.transcript, f"the transcript of voice {n} ({voice.name!r})", quirks))
        if system is not None:
            if not dialect.turns:
                raise PromptError("this model takes no system text", hint="leave it out")
            if not system.strip():
                raise PromptError("the system text is empty", hint="leave it out, and the model's usual instruction is used")
            system = self._prepare_whole(system, "the system text", quirks)
        if dialect.turns:
            parts = self._system_messages(texts, voices, system)
        else:
            parts = list(dialect.opening)
            for text, voice in zip(texts, voices, strict=True):
                parts += dialect.said(text, voice.codes)
        kind = WindowedConversation if quirks.history and self.model.history_window is not None else Conversation
        return kind(self, self.encode(parts), quirks)

    def check_transcript(self, text: str, what: str) -> None:
        """Check that the transcript of a voice can be part of a prompt; `what` names it. Raises PromptError otherwise."""
        self._prepare_whole(text, what, USUAL)

    def encode(self, parts: Sequence[str | Ints]) -> Ints:
        """Return the columns of parts, int64 [1 + num_codebooks, T]."""
        nothing = np.zeros((1 + self.model.num_codebooks, 0), np.int64)
        columns = [self._text(part) if isinstance(part, str) else self._audio(part) for part in parts]
        return np.concatenate([nothing, *columns], axis=1)

    def _system_messages(self, texts: list[str], voices: Sequence[Voice], system: str | None) -> Parts:
        begin, instruction, end = self.dialect.opening
        parts: Parts = [] if system is None else [begin, system, end]
        if voices:
            tagged = [text if SPEAKER.search(text) else f"<|speaker:{n}|>{text}" for n, text in enumerate(texts)]
            intro = f"{instruction} reference to the following:\n\nText:\n"
            codes = np.concatenate([voice.codes for voice in voices], axis=1)
            parts += [begin, intro, "\n".join(tagged), "\n\nSpeech:\n", codes, end]
        return parts or [begin, instruction, end]

    def _text(self, text: str) -> Ints:
        ids = self._tokenizer.encode(text)
        columns = np.zeros((1 + self.model.num_codebooks, len(ids)), dtype=np.int64)
        columns[0] = ids
        return columns

    def _audio(self, codes: Ints) -> Ints:
        model = self.model
        main = codes[:1] if model.code_zero == "main" else np.zeros_like(codes[:1])
        return np.concatenate((model.semantic_begin_id + main, codes + model.code_offset)).astype(np.int64)

    def _check_codes(self, codes: Ints, what: str) -> None:
        model = self.model
        if codes.ndim != 2 or codes.shape[0] != model.num_codebooks:
            raise VoiceError(
                f"{what} has codes of shape {list(codes.shape)}; this model needs [{model.num_codebooks}, frames]",
                hint="add the voice again with this bundle",
            )
        if codes.shape[1]:
            sizes = [model.codebook_width - model.code_offset] * model.num_codebooks
            if model.code_zero == "main":
                sizes[0] = min(sizes[0], model.semantic_end_id - model.semantic_begin_id + 1)
            check_entries(codes, sizes, f"the codes of {what}")

    def _prepare_whole(self, text: str, what: str, quirks: Quirks) -> str:
        """Return a text that is one part of a prompt, as `_prepare` does. Raises PromptError also for one that cannot fit."""
        if len(text) > _TOKEN_CHARACTERS * self.model.max_prompt:
            raise PromptError(
                f"{what} is too long: {len(text):,} characters, but the model takes {self.model.max_prompt:,} tokens",
                hint="use a shorter one",
            )
        return self._prepare(text, what, quirks)

    def _prepare(self, text: str, what: str, quirks: Quirks) -> str:
        """Return the text as the model reads it; `what` names it. Raises PromptError for text that must not be spoken."""
        check_unicode(text, what)
        if quirks.text:
            return self._cleaned(text)
        if not self.dialect.turns and (tag := SPEAKER.search(text)):
            raise PromptError(f"{what} has {tag[0]}, but this model knows no turns of speakers", hint="take the tags out")
        if rules := self.model.cleaning:
            text = unwrap(unicodedata.normalize("NFC", text))
            if lost := lost_letters(text, rules):
                raise PromptError(
                    f"{what} has {', '.join(lost[:10])}{', …' if lost[10:] else ''}, which this model was not taught to read",
                    hint="write it otherwise; upstream_compat leaves these letters out",
                )
            cleaned = self._cleaned(spaced(text, rules))
            if text and not cleaned:
                raise PromptError(f"{what} has nothing to speak that this model was taught to read", hint="write it in words")
            text = cleaned
        # Searched after the cleaning, which can make a control token by dropping characters inside it.
        if names := [name for name in self._tokenizer.control_tokens(text) if not SPEAKER.fullmatch(name)]:
            raise PromptError(
                f"{what} contains {', '.join(names)}, which would steer the model instead of being spoken",
                hint="take it out, or write it with a space, as '< |'",
            )
        return text

    def _cleaned(self, text: str) -> str:
        return text if self.model.cleaning is None else clean_text(text, self.model.cleaning)


class Conversation:
    """The history of one request. For each piece of text: `prompt = user(text)`, generate, `assistant(columns)`.

    Earlier pieces have the same form in the prompt as voices, with an end after their speech: the models were trained on this
    form, and learn from it that a piece ends. The original does the same, except in the dialects of `WindowedConversation`.
    """

    def __init__(self, builder: PromptBuilder, head: Ints, quirks: Quirks) -> None:
        self._builder = builder
        self._head = head
        self._quirks = quirks
        self._history: list[Ints] = []
        self._text = ""

    @property
    def head(self) -> Ints:
        """The start of every prompt, system text and voices: int64 [1 + num_codebooks, T], maybe of no columns."""
        return self._head

    def user(self, text: str) -> Ints:
        """Return the prompt int64 [1 + num_codebooks, T] for the next piece of `split`.

        The oldest pieces are dropped when the prompt would exceed `max_prompt`; `Quirks.history` keeps all.
        Raises PromptError if the prompt is still too long.
        """
        self._text = text
        now = self._asked()
        fixed, limit = self._head.shape[1] + now.shape[1], self._builder.model.max_prompt
        said = sum(piece.shape[1] for piece in self._history)
        while self._history and fixed + said > limit and not self._quirks.history:
            said -= self._history.pop(0).shape[1]
        if fixed + said > limit:
            raise PromptError(
                f"the prompt is too long: {fixed + said:,} columns (voices and system text {self._head.shape[1]:,}, "
                f"text {now.shape[1]:,}, earlier pieces {said:,}), but the model takes {limit:,} and then speech",
                hint="use shorter text" if now.shape[1] > self._head.shape[1] else "use shorter or fewer references",
            )
        return np.concatenate([self._head, *self._history, now], axis=1)

    def assistant(self, columns: Ints) -> None:
        """Add the columns int64 [1 + num_codebooks, T] drawn for the last `user` text to the history, without the end token's.

        The original leaves out the last column, end token or not.
        """
        model = self._builder.model
        spoken = columns[:, :-1] if self._quirks.history else columns[:, columns[0] != model.end_id]
        if spoken.shape[1]:  # after a silent piece in the prompt, the model would stay silent
            end = self._builder.encode([self._builder.dialect.end])
            self._history.append(np.concatenate([self._asked(), spoken, end], axis=1))

    def _asked(self) -> Ints:
        return self._builder.encode(self._builder.dialect.asked(self._text))


class WindowedConversation(Conversation):
    """The history of models with a `history_window`, to the letter of the original.

    Columns are kept as drawn, without an end after them. Each text and each speech is one element. The first two elements are
    always kept. Of the rest, an odd number of the newest are kept: those newer than the one that no longer fits, counted twice.
    If that one is the newest, all elements are repeated. A prompt longer than `history_window` is no error.
    """

    def user(self, text: str) -> Ints:
        """Return the prompt int64 [1 + num_codebooks, T] for the next piece."""
        self._text = text
        elements = [*self._history, self._asked()]
        window = self._builder.model.history_window
        assert window is not None
        room = window - self._head.shape[1]
        lengths = np.array([element.shape[1] for element in reversed(elements)])
        too_much = np.cumsum(lengths) + lengths > room
        nth = int(too_much.argmax()) if too_much.any() else len(elements) - 1
        if nth and nth % 2 == 0:
            nth -= 1
        if nth < len(elements) - 2:
            elements = elements[:2] + elements[-nth:]
        return np.concatenate([self._head, *elements], axis=1)

    def assistant(self, columns: Ints) -> None:
        """Add the columns int64 [1 + num_codebooks, T] drawn for the last `user` text to the history."""
        kept = columns.shape[1] - self._builder.dialect.not_remembered
        self._history += [self._asked(), columns[:, :kept]]
