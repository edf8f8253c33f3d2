"""A checkpoint's tokenizer as the text of a `tokenizer.json`, the one form that the runtime reads.

A `tokenizer.tiktoken` is converted to byte-level BPE with upstream's pattern for splitting text, and with control tokens whose
ids follow the ranks. Every text has the same ids as with tiktoken. Upstream encodes slices of 400,000 characters separately; the
conversion does not, since no prompt is that long.
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from ..errors import ExportError
from .content import DAMAGED, read_json, read_text
from .families import Family
from .names import SPECIAL_TOKENS, TOKENIZER

# Upstream's pattern. The last alternative but one looks like a mistyped look-ahead; as it is, it matches white space before "?!"
# and a character. The models were trained on its ids.
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
    """Return the text of the `tokenizer.json`. Raises ExportError."""
    if path.name == TOKENIZER:
        return read_text(path)
    listed = path.with_name(SPECIAL_TOKENS)
    names = tuple(read_json(listed)) if family.lists_control_tokens and listed.is_file() else family.control_tokens
    return convert_tiktoken(read_ranks(path, skips_empty=family.lists_control_tokens), names).to_str()


def read_vocabulary(text: str, source: Path) -> dict[str, int]:
    """Return the id of each token of a `tokenizer.json`. Raises ExportError."""
    try:
        return Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception
        raise ExportError(f"{source} cannot be read: {error}", hint=DAMAGED) from None


def read_ranks(path: Path, *, skips_empty: bool = True) -> list[bytes]:
    """Return the tokens of a `tokenizer.tiktoken` by rank. Raises ExportError.

    skips_empty: whether a line whose token is "=", the empty token, is ignored.
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
    """Return a tokenizer in which the id of each of `tokens` is its index, and the ids of `control` follow."""
    names = _byte_names()
    ranks = {token: rank for rank, token in enumerate(tokens)}
    spelled = ["".join(names[byte] for byte in token) for token in tokens]
    splits = (_parts(token, ranks) for token in tokens)
    merges = [(spelled[ranks[parts[0]]], spelled[ranks[parts[1]]]) for parts in splits if len(parts) == 2]
    # As in tiktoken, a piece that is a token becomes that token even if merges would not lead to it.
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
    """Return the parts of a token in tiktoken's merging, before the last merge makes them the token itself.

    If there are two parts, the token is only ever merged from this pair: no earlier merge crosses the token's ends, so merging
    within it is the same in any context.
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
    """Return the character that stands for each byte in byte-level BPE: itself if printable, else one from U+0100 on."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unseen = iter(range(256, 512))
    return [chr(byte) if byte in seen else chr(next(unseen)) for byte in range(256)]
