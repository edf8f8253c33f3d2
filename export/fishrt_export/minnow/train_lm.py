"""Stage 3: the dual-AR language model, trained on prompts of the very form that the runtime builds.

Each example is a prompt with its answer: mostly one reference of the same speaker, sometimes several speakers with tagged turns,
sometimes none, sometimes a turn of history. Every audio frame is a target, those of the references too: nothing is wasted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .config import LANGUAGE_MODEL
from .model import DualAr
from .synth import VOICES, SpeechData
from .text_tokens import build_tokenizer, token_id
from .trainer import train

BATCH = 24
POOL = 8
"""Batches whose examples are sorted by length together, so that little is padded."""
FAST_SHARE = 0.3
"""Share of the frames on which the fast AR is trained in each step; all would cost more than they teach."""
GUIDE_STEPS = 4000
GUIDE_WEIGHT = 0.5
"""In the first steps two attention heads are told to look at the text that is being spoken. Without this the model takes long to
find out that the text matters."""
SIZE_STEP = 32
"""Lengths and counts are multiples of this: the matrix library compiles a kernel for every new shape and keeps it for ever."""
NOISE = 0.04
FRAME_NOISE = 0.08
"""Shares of input codes, and of whole frames, replaced at random, so that the model learns to recover from its own slips."""
REFERENCE_FRAMES = range(30, 111)
MAX_COLUMNS = 640
SYSTEM = "convert the provided text to speech"


@dataclass(frozen=True, slots=True)
class Spoken:
    """An utterance as text and codes, uint8 [codebooks, frames]."""

    text: str
    codes: np.ndarray


@dataclass(frozen=True, slots=True)
class Sound:
    """The codes of an utterance, where a prompt holds them; its text stands further in front."""

    of: Spoken


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with its answer, and where the text of each frame is."""

    prompt: np.ndarray
    """int64 [1+codebooks, length]"""
    centre: np.ndarray
    """float64 [length]: the column of the text that is about to be spoken, if a sentence were spoken evenly."""
    width: np.ndarray
    """float64 [length]: how far off that may be, in columns; 0 where no frame follows."""


class Examples:
    """Draws training examples."""

    def __init__(self, folder: Path, data: SpeechData) -> None:
        self.tokenizer = build_tokenizer()
        self.begin = token_id(self.tokenizer, "<|semantic:0|>")
        self.end = token_id(self.tokenizer, "<|im_end|>")
        self.by_voice: dict[str, list[Spoken]] = {voice: [] for voice in VOICES}
        with np.load(folder / "codes.npz") as stored:
            codes, starts = stored["codes"], stored["starts"]
        for n, u in enumerate(data.utterances):
            if not u.held_out:
                self.by_voice[u.voice].append(Spoken(u.text, codes[:, starts[n] : starts[n + 1]]))
        self.references = {
            voice: [s for s in spoken if s.codes.shape[1] in REFERENCE_FRAMES] for voice, spoken in self.by_voice.items()
        }

    def text(self, text: str) -> np.ndarray:
        """Columns of a piece of text; tokenisation never crosses the pieces of a prompt."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        columns = np.zeros((1 + 8, len(ids)), dtype=np.int64)
        columns[0] = ids
        return columns

    def audio(self, codes: np.ndarray) -> np.ndarray:
        return np.concatenate((codes[:1].astype(np.int64) + self.begin, codes.astype(np.int64)))

    def draw(self, rng: np.random.Generator) -> Example:
        """One example. Too long ones are drawn again."""
        while True:
            parts = self._parts(rng)
            columns: list[np.ndarray] = []
            texts: dict[int, tuple[int, int]] = {}
            centres, widths, length = [], [], 0
            for part in parts:
                if isinstance(part, Sound):
                    columns.append(self.audio(part.of.codes))
                    (start, count), frames = texts[id(part.of)], part.of.codes.shape[1]
                    centres.append((length, start + (np.arange(frames) + 0.5) / frames * count))
                    widths.append(3.0 + 0.12 * count)
                else:
                    columns.append(self.text(part if isinstance(part, str) else part.text))
                    if isinstance(part, Spoken):
                        texts[id(part)] = (length, columns[-1].shape[1])
                length += columns[-1].shape[1]
            if length <= MAX_COLUMNS:
                example = Example(np.concatenate(columns, axis=1), np.zeros(length), np.zeros(length))
                for (first, centre), width in zip(centres, widths, strict=True):
                    # A frame is drawn from the column before its own.
                    example.centre[first - 1 : first - 1 + len(centre)] = centre
                    example.width[first - 1 : first - 1 + len(centre)] = width
                return example

    def _parts(self, rng: np.random.Generator) -> list[str | Spoken | Sound]:
        """What kind of prompt, who speaks, and what: texts and sounds in the order of the prompt."""
        kind = rng.random()
        voices = [VOICES[n] for n in rng.permutation(len(VOICES))[: int(rng.integers(2, 4)) if kind < 0.15 else 1]]
        parts: list[str | Spoken | Sound] = ["<|im_start|>system\n"]
        if kind < 0.92:
            references = [self._pick(self.references[v], rng) for v in voices]
            parts += [f"{SYSTEM} reference to the following:\n\nText:\n"]
            for n, reference in enumerate(references):
                parts += ["\n" if n else "", f"<|speaker:{n}|>", reference]
            parts += ["\n\nSpeech:\n", *map(Sound, references)]
        else:
            parts += [SYSTEM]
        parts += ["<|im_end|>\n"]
        for _ in range(2 if kind > 0.8 else 1):
            parts += ["<|im_start|>user\n"]
            said: list[Spoken] = []
            for n in range(int(rng.choice((1, 1, 2, 3))) if kind < 0.15 else 1):
                speaker = int(rng.integers(len(voices)))
                tagged = kind < 0.15 or rng.random() < 0.15
                turn = self._turn(voices[speaker], rng)
                parts += ["\n" if n else "", f"<|speaker:{speaker}|>" if tagged else "", turn[0]]
                for more in turn[1:]:
                    parts += [" ", more]
                said += turn
            parts += ["<|im_end|>\n", "<|im_start|>assistant\n<|voice|>", *map(Sound, said), "<|im_end|>\n"]
        return parts

    def _turn(self, voice: str, rng: np.random.Generator) -> list[Spoken]:
        """One sentence, or now and then two or three in one breath."""
        count = 1 if rng.random() < 0.8 else int(rng.integers(2, 4))
        return [self._pick(self.by_voice[voice], rng) for _ in range(count)]

    @staticmethod
    def _pick(spoken: list[Spoken], rng: np.random.Generator) -> Spoken:
        chosen = spoken[int(rng.integers(len(spoken)))]
        return Spoken(chosen.text, chosen.codes)  # a copy, so that the same sentence twice in a prompt is two things


def train_lm(folder: Path, data: SpeechData, *, steps: int, seed: int = 3) -> None:
    """Trains on all utterances that are not held out."""
    torch.manual_seed(seed)
    examples = Examples(folder, data)
    model = DualAr(LANGUAGE_MODEL, vocab_size=vocab_size(), semantic_begin=examples.begin, end_id=examples.end)
    slow, fast = torch.compile(model.slow, dynamic=True), torch.compile(model.fast, dynamic=True)
    pool: dict[int, list[list[Example]]] = {}

    def batch(n: int) -> list[Example]:
        group = n // POOL
        if group not in pool:
            rng = np.random.default_rng((seed, group))
            drawn = sorted((examples.draw(rng) for _ in range(BATCH * POOL)), key=lambda e: e.prompt.shape[1])
            batches = [drawn[i * BATCH : (i + 1) * BATCH] for i in range(POOL)]
            pool.clear()
            pool[group] = [batches[i] for i in rng.permutation(POOL)]
        return pool[group][n % POOL]

    def step(n: int, rng: torch.Generator) -> dict[str, Tensor]:
        drawn = batch(n)
        length = -(-max(e.prompt.shape[1] for e in drawn) // SIZE_STEP) * SIZE_STEP + 1
        prompts = torch.zeros(len(drawn), 1 + model.codebooks, length, dtype=torch.int64)
        centre, width = torch.zeros(2, len(drawn), length - 1)
        for row, example in enumerate(drawn):
            end = example.prompt.shape[1]
            prompts[row, :, :end] = torch.from_numpy(example.prompt)
            centre[row, : end - 1], width[row, : end - 1] = torch.from_numpy(np.stack((example.centre, example.width)))[:, :-1]
        inputs, following = corrupt(prompts[..., :-1], model, rng), prompts[..., 1:]
        is_audio = (following[:, 0] >= examples.begin) & (prompts[:, 0, 1:] < examples.begin + model.width)
        after_audio = (prompts[:, 0, :-1] >= examples.begin) & (following[:, 0] == examples.end)
        main = torch.where(is_audio, following[:, 0] - examples.begin + 1, 0).flatten()
        judged = some((is_audio | after_audio).flatten(), 1.0, rng)
        frames = some(is_audio.flatten(), FAST_SHARE, rng)
        codes, target = following[:, 1:].transpose(1, 2).flatten(0, 1)[frames], main[judged]
        with torch.autocast("cpu", torch.bfloat16):
            hidden, astray = slow(inputs, centre, width)
            hidden = hidden.flatten(0, 1)
            logits = model.main_logits(hidden[judged])
            fast_logits = fast(hidden[frames], codes)
        slow_loss = F.cross_entropy(logits.float(), target)
        fast_losses = F.cross_entropy(fast_logits.float().transpose(1, 2), codes[:, 1:], reduction="none").mean(dim=0)
        return {
            "loss": slow_loss + fast_losses.mean() + (GUIDE_WEIGHT if n < GUIDE_STEPS else 0.0) * astray,
            "astray": astray,
            "slow": slow_loss,
            "fast": fast_losses.mean(),
            "fast1": fast_losses[0],
            "end": F.cross_entropy(logits.float()[target == 0], target[target == 0]),
        }

    train("lm", folder, model, step, steps=steps, learning_rate=2e-3, warmup=300, weight_decay=0.01, seed=seed)


def some(mask: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """Indices of a random `share` of the true entries, their number rounded down to a multiple of SIZE_STEP."""
    indices = torch.nonzero(mask)[:, 0]
    count = int(share * len(indices)) // SIZE_STEP * SIZE_STEP
    return indices[torch.randperm(len(indices), generator=rng)[:count]]


def corrupt(prompts: Tensor, model: DualAr, rng: torch.Generator) -> Tensor:
    """Replaces NOISE of the codes and FRAME_NOISE of the frames by random ones; the main token follows code 0."""
    audio = (prompts[:, :1] >= model.semantic_begin) & (prompts[:, :1] < model.semantic_begin + model.width)
    codes = prompts[:, 1:]
    hit = (torch.rand(codes.shape, generator=rng) < NOISE) | (torch.rand(audio.shape, generator=rng) < FRAME_NOISE)
    hit &= audio
    codes = torch.where(hit, torch.randint(model.width, codes.shape, generator=rng), codes)
    main = torch.where(audio, codes[:, :1] + model.semantic_begin, prompts[:, :1])
    return torch.cat((main, codes), dim=1)


def vocab_size() -> int:
    """Rows of the embedding table: the tokenizer's size, rounded up to 32."""
    return -(-build_tokenizer().get_vocab_size() // 32) * 32
