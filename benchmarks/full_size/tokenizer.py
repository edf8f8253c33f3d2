"""Byte-level tokenizers of the official sizes and ids that split English into whole words, as the official ones do.

The first ids are the 256 bytes and pieces of words, learned from the texts of the benchmarks and the words of prompts until each
word is a token. Fillers without ASCII follow.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from server_clients import TEXTS

SENTENCES = Path(__file__).parent.parent / "held_out.txt"
_PROMPTS = ("system", "user", "assistant", "Speak out the provided text.", "convert the provided text to speech")
"""What prompts have beside the text that is spoken."""
_FIRST_1_2 = ("begin_of_sequence", "end_of_sequence", "im_start", "im_sep", "im_end", "semantic", "pad")
_FIRST_S2 = ("endoftext", "im_start", "im_end")
_LAST_S2 = ("pad", "phoneme_start", "phoneme_end", "text", "voice", "interleave", "audio_start", "audio_end", "audio_pad")
_LAST_S2_ID = 151669
"""Id of <|pad|>; the ids between it and the first control tokens are Qwen's and unused."""
_OFFICIAL_TEXT = 151643
_SEMANTIC_S2 = 4096


def write_tiktoken(path: Path, text_tokens: int) -> None:
    """Write `tokenizer.tiktoken` with `text_tokens` ranks."""
    pieces, _ = _pieces(text_tokens)
    to_byte = _byte_of_name()
    with path.open("w") as file:
        for rank, piece in enumerate(pieces):
            file.write(f"{base64.b64encode(bytes(to_byte[c] for c in piece)).decode()} {rank}\n")


def write_special_tokens(path: Path, names: tuple[str, ...], text_tokens: int) -> None:
    """Write `special_tokens.json`: ids after the ranks, by name."""
    path.write_text(json.dumps({name: text_tokens + n for n, name in enumerate(names)}, indent=1))


def write_1_2(path: Path, text_tokens: int) -> None:
    """Write `tokenizer.json` of 1.2 and 1.4: control tokens first; `text_tokens` includes them."""
    _write(path, [_control(name) for name in _FIRST_1_2], text_tokens - len(_FIRST_1_2), [])


def write_s2(path: Path, text_tokens: int) -> int:
    """Write `tokenizer.json` of S2: control tokens last. Return the number of ids."""
    unused = [f"<|unused:{n}|>" for n in range(_LAST_S2_ID - _OFFICIAL_TEXT - len(_FIRST_S2))]
    last = [*map(_control, _FIRST_S2), *unused, *map(_control, _LAST_S2)]
    last += [f"<|semantic:{n}|>" for n in range(_SEMANTIC_S2)]
    _write(path, [], text_tokens, last)
    return text_tokens + len(last)


def _write(path: Path, first: list[str], text_tokens: int, last: list[str]) -> None:
    pieces, merges = _pieces(text_tokens)
    tokenizer = Tokenizer(models.BPE(vocab={t: n for n, t in enumerate([*first, *pieces, *last])}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in first + last])
    tokenizer.save(str(path))
    path.with_name("tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    path.with_name("special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>", "pad_token": "<|pad|>"}))


def _control(name: str) -> str:
    return f"<|{name}|>"


def _pieces(count: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Return `count` tokens in the spelling of byte-level tokenizers, bytes first, and the merges of the others."""
    pieces, merges = (list(part) for part in _learned())
    fillers = _fillers()
    while len(pieces) < count:
        left, right = next(fillers)
        pieces.append(left + right)
        merges.append((left, right))
    return pieces[:count], merges[: count - 256]


@cache
def _learned() -> tuple[list[str], list[tuple[str, str]]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = list(_byte_of_name())
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*SENTENCES.read_text().splitlines(), *TEXTS, *_PROMPTS], trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    return alphabet + [left + right for left, right in merges], merges


def _fillers() -> Iterator[tuple[str, str]]:
    """Yield pairs of bytes beyond ASCII, then each pair with one more byte: 2 million merges."""
    high = [name for name, byte in _byte_of_name().items() if byte >= 0x80]
    yield from product(high, high)
    for first, second, third in product(high, repeat=3):
        yield first + second, third


@cache
def _byte_of_name() -> dict[str, int]:
    """Return bytes by their character in byte-level tokenizers: the byte itself if it is printable, else one from 256 on."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unseen = iter(range(256, 512))
    return {chr(byte) if byte in seen else chr(next(unseen)): byte for byte in range(256)}
