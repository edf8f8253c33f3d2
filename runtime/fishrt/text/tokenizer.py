"""Text ↔ token ids, by the bundle's `tokenizer.json`. The export converts every family's tokenizer to that form."""

from __future__ import annotations

import re
from pathlib import Path

import tokenizers

from ..errors import BundleError

_CONTROL_NAME = re.compile(r"<\|.*\|>", re.DOTALL)


class Tokenizer:
    """A byte-level tokenizer: every text has ids. It adds no tokens at the ends."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        # A file may ask for both; a text that is silently cut or padded would be spoken wrongly.
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        added = inner.get_added_tokens_decoder().items()
        self._control = {id_: token.content for id_, token in added if token.special or _CONTROL_NAME.fullmatch(token.content)}

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`. Raises BundleError for a file that is missing or is not a tokenizer."""
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception for everything
            raise BundleError(f"{path} is not a tokenizer: {error}", hint="export the checkpoint again") from None

    @classmethod
    def from_json(cls, data: bytes) -> Tokenizer:
        """Return the tokenizer that the bytes of a `tokenizer.json` describe."""
        return cls(tokenizers.Tokenizer.from_str(data.decode()))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, maybe empty; control tokens spelled out in it become their ids."""
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, with control tokens spelled out."""
        return str(self._inner.decode(ids, skip_special_tokens=False))

    def token_id(self, name: str) -> int:
        """Return the id of one token. Raises BundleError if the tokenizer lacks it."""
        id_ = self._inner.token_to_id(name)
        if id_ is None:
            raise BundleError(f"the tokenizer has no token {name!r}", hint="export the checkpoint again")
        return int(id_)

    def control_tokens(self, text: str) -> list[str]:
        """Return the names of the control tokens in the ids of a text, in order, each once."""
        return list(dict.fromkeys(self._control[id_] for id_ in self.encode(text) if id_ in self._control))
