"""A checkpoint's tokenizer as the text of a `tokenizer.json`, the one form that the runtime reads.

A `tokenizer.tiktoken` is converted: byte-level BPE with the pattern that upstream splits text by, and control tokens whose ids
follow the ranks. The ids of every text are tiktoken's. Upstream cuts text into slices of 400,000 characters and encodes each on
its own; that is left out, as no prompt is near that long.
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from .content import DAMAGED, read_json, read_text
from .errors import ExportError
from .families import Family
from .files import SPECIAL_TOKENS, TOKENIZER

# As upstream has it. The last but one alternative looks like a mistyped look-ahead, and really is white space before "?!" and
# a character: its ids are what the models were trained on.
PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"\p{P}",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(\?!\S)",
        r"\s+",
    )
)


def read_tokenizer(path: Path, family: Family) -> str:
    """The text of the `tokenizer.json`. Raises ExportError."""
    if path.name == TOKENIZER:
        return read_text(path)
    listed = path.with_name(SPECIAL_TOKENS)
    names = tuple(read_json(listed)) if family.lists_control_tokens and listed.is_file() else family.control_tokens
    return convert_tiktoken(read_ranks(path, skips_empty=family.lists_control_tokens), names).to_str()


def read_vocabulary(text: str, source: Path) -> dict[str, int]:
    """Token → id of a `tokenizer.json`. Raises ExportError."""
    try:
        return Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception
        raise ExportError(f"{source} cannot be read: {error}", hint=DAMAGED) from None


def read_ranks(path: Path, *, skips_empty: bool = True) -> list[bytes]:
    """The tokens of a `tokenizer.tiktoken` by rank. Raises ExportError.

    skips_empty: a line whose token is "=", the empty token, is passed over. If not, it counts.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            match line.split():
                case []:
                    continue
                case ["=", rank]:
                    if not skips_empty:
                        ranks[b""] = int(rank)
                case [token, rank]:
                    ranks[b64decode(token, validate=True)] = int(rank)
                case _:
                    raise ValueError("expected a token and its rank")
        except (binascii.Error, ValueError) as error:
            raise ExportError(f"{path}, line {number} cannot be read: {error}", hint=DAMAGED) from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ExportError(f"{path}: the ranks of its {len(ranks)} tokens are not 0, 1, 2, …", hint=DAMAGED)
    if lacking := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ExportError(f"{path} has no token for {len(lacking)} of the 256 bytes, first {lacking[0]:#04x}", hint=DAMAGED)
    return sorted(ranks, key=ranks.__getitem__)


def convert_tiktoken(tokens: list[bytes], control: tuple[str, ...]) -> Tokenizer:
    """A tokenizer with the same ids: those of `tokens` are their places, those of `control` follow."""
    names = _byte_names()
    ranks = {token: rank for rank, token in enumerate(tokens)}
    spelled = ["".join(names[byte] for byte in token) for token in tokens]
    splits = (_parts(token, ranks) for token in tokens)
    merges = [(spelled[ranks[parts[0]]], spelled[ranks[parts[1]]]) for parts in splits if len(parts) == 2]
    # A piece that is a token becomes that token, as tiktoken has it, even where merges would not lead there.
    bpe = models.BPE(vocab={name: rank for rank, name in enumerate(spelled)}, merges=merges, ignore_merges=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in control])
    return tokenizer


def _parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """What tiktoken's merging makes of a token, just before it may become the token itself.

    Two parts are the one pair that this token is ever merged from: while its bytes become these parts, no merge has crossed its
    ends, so merging went on within it as it does here, whatever stands around it.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        places = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not places:
            break
        _, i = min(places)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _byte_names() -> list[str]:
    """The character that byte-level tokenizers write for each byte: itself where it can be seen, else one from 256 on."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unseen = iter(range(256, 512))
    return [chr(byte) if byte in seen else chr(next(unseen)) for byte in range(256)]
