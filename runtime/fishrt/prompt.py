"""Text and voices → the prompt int64 [1 + num_codebooks, T]. The only file that knows `<|im_start|>`.

The dialect "conversation": messages of a role and parts, text or codes, one after the other:

    system     convert the provided text to speech reference to the following: … Text: … Speech: ⟨codes of all voices⟩
    user       text of the first piece           ┐ repeated for each piece that was spoken; the oldest are forgotten
    assistant  <|voice|>⟨codes of that piece⟩    ┘ when the prompt would grow too long
    user       text of this piece
    assistant  <|voice|>                           ← the model goes on here

Row 0 holds token ids, where a frame is `semantic_begin_id + code 0`; rows 1… hold the codes of a frame, and 0 below text.
Every part is tokenised by itself, never across a border between parts: the ids depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .bundle import LanguageModel
from .codec import check_entries
from .errors import PromptError, VoiceError
from .text import (
    MAX_TURNS,
    SPEAKER,
    before_first_turn,
    check_text,
    check_unicode,
    pack_turns,
    speakable,
    speaker_turns,
    split_sentences,
    split_turn,
    with_end,
)
from .tokenizer import Tokenizer
from .voices import Voice, max_prompt

INSTRUCTION = "convert the provided text to speech"
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Message:
    """One message: `parts` are texts and codes int64 [num_codebooks, frames]. An open one ends without the end token."""

    role: str
    parts: tuple[str | Ints, ...]
    modality: str | None = None
    """The name inside a `<|…|>` behind the role: voice, text, interleave."""
    open: bool = False


class PromptBuilder:
    """Makes prompts for one language model."""

    def __init__(self, tokenizer: Tokenizer, language_model: LanguageModel) -> None:
        self._tokenizer = tokenizer
        self._model = language_model

    @property
    def max_prompt(self) -> int:
        """Most columns of a prompt that leaves room for speech."""
        return max_prompt(self._model)

    def split(self, text: str, *, upstream_compat: bool = False, chunk_bytes: int | None = None) -> list[str]:
        """Pieces of a text that are spoken one after the other; `chunk_bytes` (UTF-8) defaults to the manifest's.

        Turns of speakers are packed into pieces of at most five turns and `chunk_bytes`. Text that is too long, with or without a
        speaker tag, is split at sentence ends, and each part of a turn repeats its tag. Text before the first tag is speaker 0's.
        What has no letter or digit holds nothing to speak and is left out. A piece or turn that ends in a letter or digit is
        given a full stop.

        `upstream_compat`: the text before the first tag is dropped, nothing is split within a turn or added, text without tags is
        one piece whatever its length, and control tokens in the text act.

        Raises PromptError for text with nothing to speak, lone surrogates, or control tokens.
        """
        limit = self._model.chunk_bytes if chunk_bytes is None else chunk_bytes
        check_text(text)
        turns = speaker_turns(text)
        if upstream_compat:
            return pack_turns(turns, MAX_TURNS, limit) if turns else [text]
        self._refuse_control_tokens(text, "the text")
        if not turns:
            return [with_end(piece) for piece in split_sentences(text, limit) if speakable(piece)]
        if first := before_first_turn(text):
            turns = [f"<|speaker:0|>{first}", *turns]
        parts = [with_end(part) for turn in turns for part in split_turn(turn, limit) if speakable(part)]
        return pack_turns(parts, MAX_TURNS, limit)

    def start(self, voices: Sequence[Voice] = (), system: str | None = None, *, upstream_compat: bool = False) -> Conversation:
        """A conversation in which voice i speaks as `<|speaker:i|>`.

        `system` takes the place of the usual instruction; with voices it is a message of its own in front, because theirs is
        worded as the model learnt it. Raises VoiceError for codes that are not this model's, PromptError for bad text.
        """
        messages = []
        for n, voice in enumerate(voices):
            self._check_codes(voice.codes, f"voice {voice.name!r}")
            check_unicode(voice.transcript, f"the transcript of voice {voice.name!r}")
            if not upstream_compat:
                self._refuse_control_tokens(voice.transcript, f"the transcript of voice {n} ({voice.name!r})")
        if system is not None:
            check_unicode(system, "the system text")
            if not system.strip():
                raise PromptError("the system text is empty", hint="leave it out, and the model's usual instruction is used")
            if not upstream_compat:
                self._refuse_control_tokens(system, "the system text")
            messages.append(Message("system", (system,)))
        if voices:
            tagged = [
                v.transcript if SPEAKER.search(v.transcript) else f"<|speaker:{n}|>{v.transcript}" for n, v in enumerate(voices)
            ]
            intro = f"{INSTRUCTION} reference to the following:\n\nText:\n"
            codes = np.concatenate([v.codes for v in voices], axis=1)
            messages.append(Message("system", (intro, "\n".join(tagged), "\n\nSpeech:\n", codes)))
        if not messages:
            messages.append(Message("system", (INSTRUCTION,)))
        return Conversation(self, self.encode(messages), keep_all=upstream_compat)

    def encode(self, messages: Sequence[Message]) -> Ints:
        """The columns of messages, int64 [1 + num_codebooks, T]. Raises VoiceError for codes that are not this model's."""
        parts: list[str | Ints] = []
        for message in messages:
            parts += [f"<|im_start|>{message.role}\n" + (f"<|{message.modality}|>" if message.modality else ""), *message.parts]
            if not message.open:
                parts.append("<|im_end|>\n")
        return np.concatenate([self._text(p) if isinstance(p, str) else self._audio(p) for p in parts], axis=1)

    def _text(self, text: str) -> Ints:
        ids = self._tokenizer.encode(text)
        columns = np.zeros((1 + self._model.num_codebooks, len(ids)), dtype=np.int64)
        columns[0] = ids
        return columns

    def _audio(self, codes: Ints) -> Ints:
        self._check_codes(codes, "a part of the conversation")
        return np.concatenate((codes[:1] + self._model.semantic_begin_id, codes)).astype(np.int64)

    def _check_codes(self, codes: Ints, what: str) -> None:
        model = self._model
        if codes.ndim != 2 or codes.shape[0] != model.num_codebooks:
            raise VoiceError(
                f"{what} has codes of shape {list(codes.shape)}; this model needs [{model.num_codebooks}, frames]",
                hint="add the voice again with this bundle",
            )
        if codes.shape[1]:
            semantic = model.semantic_end_id - model.semantic_begin_id + 1
            first = min(semantic, model.codebook_width)
            check_entries(codes, [first] + [model.codebook_width] * (model.num_codebooks - 1), f"the codes of {what}")

    def _refuse_control_tokens(self, text: str, what: str) -> None:
        if names := [name for name in self._tokenizer.control_tokens(text) if not SPEAKER.fullmatch(name)]:
            raise PromptError(
                f"{what} contains {', '.join(names)}, which would steer the model instead of being spoken",
                hint="take it out, or write it with a space, as '< |'; only <|speaker:0|>, <|speaker:1|>, … may be used",
            )


class Conversation:
    """What was said so far in one request. For each piece of text: `prompt = user(text)`, generate, `assistant(codes)`."""

    def __init__(self, builder: PromptBuilder, system: Ints, *, keep_all: bool) -> None:
        self._builder = builder
        self._system = system
        self._history: list[Ints] = []
        self._asked = ""
        self._keep_all = keep_all

    def user(self, text: str) -> Ints:
        """The prompt int64 [1 + num_codebooks, T] for the next piece, as `split` gave it.

        Forgets the oldest pieces as soon as the prompt would exceed `max_prompt`; upstream_compat keeps all.
        Raises PromptError if it is too long even so.
        """
        self._asked = text
        now = self._builder.encode([Message("user", (text,)), Message("assistant", (), "voice", open=True)])
        fixed, limit = self._system.shape[1] + now.shape[1], self._builder.max_prompt
        said = sum(turn.shape[1] for turn in self._history)
        while self._history and fixed + said > limit and not self._keep_all:
            said -= self._history.pop(0).shape[1]
        if fixed + said > limit:
            raise PromptError(
                f"the prompt is too long: {fixed + said:,} columns (voices and system text {self._system.shape[1]:,}, "
                f"text {now.shape[1]:,}, earlier pieces {said:,}), but the model takes {limit:,} and then speech",
                hint="use shorter text" if now.shape[1] > self._system.shape[1] else "use shorter or fewer references",
            )
        return np.concatenate([self._system, *self._history, now], axis=1)

    def assistant(self, codes: Ints) -> None:
        """Remembers the codes int64 [num_codebooks, frames] that were spoken for the last `user` text."""
        if not codes.shape[1]:  # an answer without sound would teach the model to be silent
            return
        self._history.append(self._builder.encode([Message("user", (self._asked,)), Message("assistant", (codes,), "voice")]))
