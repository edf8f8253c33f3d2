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
SIZE_STEP = 32
"""Lengths and counts are multiples of this: the matrix library compiles a kernel for every new shape and keeps it for ever."""
NOISE = 0.04
"""Share of input codes replaced at random, so that the model learns to recover from its own slips."""
REFERENCE_FRAMES = range(30, 111)
MAX_COLUMNS = 640
SYSTEM = "convert the provided text to speech"


@dataclass(frozen=True, slots=True)
class Spoken:
    """An utterance as text and codes, uint8 [codebooks, frames]."""

    text: str
    codes: np.ndarray


class Examples:
    """Draws training examples: int64 [1+codebooks, length] each."""

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

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """One example. Too long ones are drawn again."""
        while True:
            parts = self._parts(rng)
            example = np.concatenate([self.text(p) if isinstance(p, str) else self.audio(p) for p in parts], axis=1)
            if example.shape[1] <= MAX_COLUMNS:
                return example

    def _parts(self, rng: np.random.Generator) -> list[str | np.ndarray]:
        """What kind of prompt, who speaks, and what: strings and codes in the order of the prompt."""
        kind = rng.random()
        voices = [VOICES[n] for n in rng.permutation(len(VOICES))[: int(rng.integers(2, 4)) if kind < 0.15 else 1]]
        parts: list[str | np.ndarray] = ["<|im_start|>system\n"]
        if kind < 0.92:
            references = [self._pick(self.references[v], rng) for v in voices]
            texts = "\n".join(f"<|speaker:{n}|>{r.text}" for n, r in enumerate(references))
            parts += [f"{SYSTEM} reference to the following:\n\nText:\n{texts}\n\nSpeech:\n"]
            parts += [np.concatenate([r.codes for r in references], axis=1)]
        else:
            parts += [SYSTEM]
        parts += ["<|im_end|>\n"]
        for _ in range(2 if kind > 0.8 else 1):
            if kind < 0.15:
                said = self._dialogue(voices, rng)
            else:
                said = self._speech(voices[0], "<|speaker:0|>" if rng.random() < 0.15 else "", rng)
            parts += ["<|im_start|>user\n", said.text, "<|im_end|>\n"]
            parts += ["<|im_start|>assistant\n<|voice|>", said.codes, "<|im_end|>\n"]
        return parts

    def _speech(self, voice: str, tag: str, rng: np.random.Generator) -> Spoken:
        """One sentence, or now and then two or three in one breath."""
        count = 1 if rng.random() < 0.8 else int(rng.integers(2, 4))
        said = [self._pick(self.by_voice[voice], rng) for _ in range(count)]
        return Spoken(tag + " ".join(s.text for s in said), np.concatenate([s.codes for s in said], axis=1))

    def _dialogue(self, voices: list[str], rng: np.random.Generator) -> Spoken:
        """One to three turns of tagged speakers in one message, as the runtime packs them."""
        turns = []
        for _ in range(int(rng.choice((1, 1, 2, 3)))):
            speaker = int(rng.integers(len(voices)))
            turns.append(self._speech(voices[speaker], f"<|speaker:{speaker}|>", rng))
        return Spoken("\n".join(t.text for t in turns), np.concatenate([t.codes for t in turns], axis=1))

    @staticmethod
    def _pick(spoken: list[Spoken], rng: np.random.Generator) -> Spoken:
        return spoken[int(rng.integers(len(spoken)))]


def train_lm(folder: Path, data: SpeechData, *, steps: int, seed: int = 3) -> None:
    """Trains on all utterances that are not held out."""
    torch.manual_seed(seed)
    examples = Examples(folder, data)
    model = DualAr(LANGUAGE_MODEL, vocab_size=vocab_size(), semantic_begin=examples.begin, end_id=examples.end)
    slow, fast = torch.compile(model.slow, dynamic=True), torch.compile(model.fast, dynamic=True)
    pool: dict[int, list[list[np.ndarray]]] = {}

    def batch(n: int) -> list[np.ndarray]:
        group = n // POOL
        if group not in pool:
            rng = np.random.default_rng((seed, group))
            drawn = sorted((examples.draw(rng) for _ in range(BATCH * POOL)), key=lambda e: e.shape[1])
            batches = [drawn[i * BATCH : (i + 1) * BATCH] for i in range(POOL)]
            pool.clear()
            pool[group] = [batches[i] for i in rng.permutation(POOL)]
        return pool[group][n % POOL]

    def step(n: int, rng: torch.Generator) -> dict[str, Tensor]:
        drawn = batch(n)
        length = -(-max(e.shape[1] for e in drawn) // SIZE_STEP) * SIZE_STEP + 1
        prompts = torch.zeros(len(drawn), 1 + model.codebooks, length, dtype=torch.int64)
        for row, example in enumerate(drawn):
            prompts[row, :, : example.shape[1]] = torch.from_numpy(example)
        inputs, following = corrupt(prompts[..., :-1], model, rng), prompts[..., 1:]
        is_audio = (following[:, 0] >= examples.begin) & (prompts[:, 0, 1:] < examples.begin + model.width)
        after_audio = (prompts[:, 0, :-1] >= examples.begin) & (following[:, 0] == examples.end)
        main = torch.where(is_audio, following[:, 0] - examples.begin + 1, 0).flatten()
        judged = some((is_audio | after_audio).flatten(), 1.0, rng)
        frames = some(is_audio.flatten(), FAST_SHARE, rng)
        codes, target = following[:, 1:].transpose(1, 2).flatten(0, 1)[frames], main[judged]
        with torch.autocast("cpu", torch.bfloat16):
            hidden = slow(inputs).flatten(0, 1)
            logits = model.main_logits(hidden[judged])
            fast_logits = fast(hidden[frames], codes)
        slow_loss = F.cross_entropy(logits.float(), target)
        fast_losses = F.cross_entropy(fast_logits.float().transpose(1, 2), codes[:, 1:], reduction="none").mean(dim=0)
        return {
            "loss": slow_loss + fast_losses.mean(),
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
    """Replaces NOISE of the codes in audio columns by random ones; the main token follows code 0."""
    audio = (prompts[:, :1] >= model.semantic_begin) & (prompts[:, :1] < model.semantic_begin + model.width)
    codes = prompts[:, 1:]
    hit = (torch.rand(codes.shape, generator=rng) < NOISE) & audio
    codes = torch.where(hit, torch.randint(model.width, codes.shape, generator=rng), codes)
    main = torch.where(audio, codes[:, :1] + model.semantic_begin, prompts[:, :1])
    return torch.cat((main, codes), dim=1)


def vocab_size() -> int:
    """Rows of the embedding table: the tokenizer's size, rounded up to 32."""
    return -(-build_tokenizer().get_vocab_size() // 32) * 32
