"""Stage 3: the dual-AR language model, trained on prompts in the form that the runtime builds.

Each example is a prompt with its answer. Most have one reference of the same speaker; others have several speakers with tagged
turns, no reference, or a turn of history. Every audio frame is a target, also in the references.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .align import Aligner
from .config import HOP, LANGUAGE_MODEL, SAMPLE_RATE
from .model import DualAr
from .synth import VOICES, SpeechData
from .text_tokens import build_tokenizer, token_id
from .trainer import train

BATCH = 24
POOL = 8
"""Number of batches whose examples are sorted by length together, to reduce padding."""
FAST_SHARE = 0.3
"""Share of the frames on which the fast AR is trained in each step. All frames would cost more than they teach."""
GUIDE_WEIGHT = 0.5
"""Weight of the loss that guides two attention heads to the letters to be spoken. Without it, the model learns late that the text
matters."""
PHONE_WEIGHT = 0.5
"""Weight of the loss by which a middle layer predicts the next two phones. Spelling is learned faster from forty phones than from
the many codes of each phone."""
ALIGN_SENTENCES, ALIGN_ROUNDS = 6000, 4
SIZE_STEP = 32
"""Divisor of lengths and counts: the matrix library compiles a kernel for every new shape and never frees it."""
NOISE = 0.04
FRAME_NOISE = 0.06
SPAN_NOISE, SPAN = 0.02, 5
"""Shares of codes, of frames, and of frames that begin a span of SPAN frames, which random codes replace in the input. The model
learns to recover from its own errors, and to read instead of continuing a sound."""
REFERENCE_FRAMES = range(30, 111)
MAX_COLUMNS = 640
SYSTEM = "convert the provided text to speech"


@dataclass(frozen=True, slots=True)
class Spoken:
    """An utterance: its text, its codes uint8 [codebooks, frames], and the letter and the phones of each frame.

    `letters` int64 [frames] are indices into the text; `phones` int64 [2, frames] are the phone of the frame and the next one.
    """

    text: str
    codes: np.ndarray
    letters: np.ndarray
    phones: np.ndarray


@dataclass(frozen=True, slots=True)
class Sound:
    """The codes of an utterance as a part of a prompt. Its text is an earlier part."""

    of: Spoken


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with its answer, and the letter and phones of each frame."""

    prompt: np.ndarray
    """int64 [1+codebooks, length]."""
    letter: np.ndarray
    """int64 [length]: the column of the letter that the next column speaks; 0 if that column is no frame."""
    phones: np.ndarray
    """int64 [2, length]: the phone that the next column speaks, and the one after it; −1 if that column is no frame."""


class Examples:
    """Random training examples from the utterances that are not held out."""

    def __init__(self, folder: Path, data: SpeechData) -> None:
        self.tokenizer = build_tokenizer()
        self.begin = token_id(self.tokenizer, "<|semantic:0|>")
        self.end = token_id(self.tokenizer, "<|im_end|>")
        self.by_voice: dict[str, list[Spoken]] = {voice: [] for voice in VOICES}
        with np.load(folder / "codes.npz") as stored:
            codes, starts = stored["codes"], stored["starts"]
        spoken = [(n, u, [name for name, _ in u.phones]) for n, u in enumerate(data.utterances) if not u.held_out]
        self.aligner = Aligner([(u.text, names) for _, u, names in spoken[:ALIGN_SENTENCES]], rounds=ALIGN_ROUNDS)
        for n, u, names in spoken:
            piece = codes[:, starts[n] : starts[n + 1]]
            middles = (np.arange(piece.shape[1]) + 0.5) * HOP / SAMPLE_RATE
            which = np.searchsorted([end for _, end in u.phones[:-1]], middles)
            ids = np.array([self.aligner.phones[name] for name in names])
            phones = np.stack((ids[which], ids[np.minimum(which + 1, len(ids) - 1)]))
            self.by_voice[u.voice].append(Spoken(u.text, piece, self.aligner(u.text, names)[which], phones))
        self.references = {
            voice: [s for s in spoken if s.codes.shape[1] in REFERENCE_FRAMES] for voice, spoken in self.by_voice.items()
        }

    def text(self, text: str) -> np.ndarray:
        """Return the columns int64 [1+codebooks, tokens] of a piece of text. Each piece of a prompt is tokenised alone."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        columns = np.zeros((1 + 8, len(ids)), dtype=np.int64)
        columns[0] = ids
        return columns

    def audio(self, codes: np.ndarray) -> np.ndarray:
        return np.concatenate((codes[:1].astype(np.int64) + self.begin, codes.astype(np.int64)))

    def draw(self, rng: np.random.Generator) -> Example:
        """Return a random example of at most MAX_COLUMNS columns."""
        while True:
            parts = self._parts(rng)
            columns: list[np.ndarray] = []
            texts: dict[int, int] = {}
            sounds: list[tuple[int, Spoken]] = []
            length = 0
            for part in parts:
                if isinstance(part, Sound):
                    columns.append(self.audio(part.of.codes))
                    sounds.append((length, part.of))
                else:
                    columns.append(self.text(part if isinstance(part, str) else part.text))
                    if isinstance(part, Spoken):
                        texts[id(part)] = length
                length += columns[-1].shape[1]
            if length <= MAX_COLUMNS:
                example = Example(np.concatenate(columns, axis=1), np.zeros(length, np.int64), np.full((2, length), -1))
                for first, spoken in sounds:
                    # A frame is drawn from the column before its own.
                    frames = slice(first - 1, first - 1 + spoken.codes.shape[1])
                    example.letter[frames] = texts[id(spoken)] + spoken.letters
                    example.phones[:, frames] = spoken.phones
                return example

    def _parts(self, rng: np.random.Generator) -> list[str | Spoken | Sound]:
        """Return random texts and sounds in the order of the prompt."""
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
        """Return one sentence, in one case of five two or three."""
        count = 1 if rng.random() < 0.8 else int(rng.integers(2, 4))
        return [self._pick(self.by_voice[voice], rng) for _ in range(count)]

    @staticmethod
    def _pick(spoken: list[Spoken], rng: np.random.Generator) -> Spoken:
        # A copy: `draw` tells parts apart by identity, and a prompt may have a sentence twice.
        return replace(spoken[int(rng.integers(len(spoken)))])


def train_lm(folder: Path, data: SpeechData, *, steps: int, seed: int = 3) -> None:
    """Train on all utterances that are not held out."""
    torch.manual_seed(seed)
    examples = Examples(folder, data)
    model = DualAr(LANGUAGE_MODEL, vocab_size=vocab_size(), semantic_begin=examples.begin, end_id=examples.end)
    phone_head = nn.Linear(LANGUAGE_MODEL["text_config"]["dim"], 2 * len(examples.aligner.phones))
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
        letter = torch.zeros(len(drawn), length - 1)
        phones = torch.full((2, len(drawn), length - 1), -1)
        for row, example in enumerate(drawn):
            end = example.prompt.shape[1]
            prompts[row, :, :end] = torch.from_numpy(example.prompt)
            letter[row, : end - 1] = torch.from_numpy(example.letter[:-1])
            phones[:, row, : end - 1] = torch.from_numpy(example.phones[:, :-1])
        inputs, following = corrupt(prompts[..., :-1], model, rng), prompts[..., 1:]
        is_audio = (following[:, 0] >= examples.begin) & (prompts[:, 0, 1:] < examples.begin + model.width)
        after_audio = (prompts[:, 0, :-1] >= examples.begin) & (following[:, 0] == examples.end)
        main = torch.where(is_audio, following[:, 0] - examples.begin + 1, 0).flatten()
        judged = some((is_audio | after_audio).flatten(), 1.0, rng)
        frames = some(is_audio.flatten(), FAST_SHARE, rng)
        codes, target = following[:, 1:].transpose(1, 2).flatten(0, 1)[frames], main[judged]
        with torch.autocast("cpu", torch.bfloat16):
            hidden, heard, astray = slow(inputs, letter)
            hidden = hidden.flatten(0, 1)
            phone_logits = phone_head(heard.flatten(0, 1)[judged]).unflatten(-1, (2, -1))
            logits = model.main_logits(hidden[judged])
            fast_logits = fast(hidden[frames], codes)
        slow_loss = F.cross_entropy(logits.float(), target)
        fast_losses = F.cross_entropy(fast_logits.float().transpose(1, 2), codes[:, 1:], reduction="none").mean(dim=0)
        phone_targets = phones.flatten(1)[:, judged].T
        phone_loss = F.cross_entropy(phone_logits.float().transpose(1, 2), phone_targets, ignore_index=-1)
        return {
            "loss": slow_loss + fast_losses.mean() + GUIDE_WEIGHT * astray + PHONE_WEIGHT * phone_loss,
            "astray": astray,
            "phone": phone_loss,
            "slow": slow_loss,
            "fast": fast_losses.mean(),
            "fast1": fast_losses[0],
            "end": F.cross_entropy(logits.float()[target == 0], target[target == 0]),
        }

    matrices = [p for p in (*model.layers.parameters(), *model.fast_layers.parameters()) if p.ndim == 2]
    modules = nn.ModuleDict({"model": model, "phone_head": phone_head})
    train(
        "lm",
        folder,
        modules,
        step,
        steps=steps,
        learning_rate=2e-3,
        warmup=300,
        decay=0.4,
        weight_decay=0.01,
        matrices=matrices,
        seed=seed,
    )


def some(mask: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """Return the indices of a random `share` of the true entries. Their number is rounded down to a multiple of SIZE_STEP."""
    indices = torch.nonzero(mask)[:, 0]
    count = int(share * len(indices)) // SIZE_STEP * SIZE_STEP
    return indices[torch.randperm(len(indices), generator=rng)[:count]]


def corrupt(prompts: Tensor, model: DualAr, rng: torch.Generator) -> Tensor:
    """Replace codes, frames and spans of frames by random ones. The main token follows code 0."""
    audio = (prompts[:, :1] >= model.semantic_begin) & (prompts[:, :1] < model.semantic_begin + model.width)
    codes = prompts[:, 1:]
    spans = (torch.rand(audio.shape, generator=rng) < SPAN_NOISE).float()
    spans = F.max_pool1d(F.pad(spans, (SPAN - 1, 0)), SPAN, stride=1) > 0
    hit = spans | (torch.rand(audio.shape, generator=rng) < FRAME_NOISE) | (torch.rand(codes.shape, generator=rng) < NOISE)
    hit &= audio
    codes = torch.where(hit, torch.randint(model.width, codes.shape, generator=rng), codes)
    main = torch.where(audio, codes[:, :1] + model.semantic_begin, prompts[:, :1])
    return torch.cat((main, codes), dim=1)


def vocab_size() -> int:
    """Return the rows of the embedding table: the tokenizer's size, rounded up to a multiple of 32."""
    return -(-build_tokenizer().get_vocab_size() // 32) * 32
