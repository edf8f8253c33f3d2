"""Text ↔ token ids, by the bundle's `tokenizer.json`. Every family's tokenizer is converted to that form when it is exported."""

from __future__ import annotations

import re
from pathlib import Path

import tokenizers

from .errors import BundleError

_CONTROL_NAME = re.compile(r"<\|.*\|>", re.DOTALL)


class Tokenizer:
    """Byte-level tokenizer: every text has ids, and adds no token of its own at the ends."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        # A file may ask for these; a text that is silently cut or filled up would be spoken wrongly.
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        added = inner.get_added_tokens_decoder().items()
        self._control = {id_: token.content for id_, token in added if token.special or _CONTROL_NAME.fullmatch(token.content)}

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Raises BundleError for a file that is missing or is not a tokenizer."""
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception for everything
            raise BundleError(f"{path} is not a tokenizer: {error}", hint="export the checkpoint again") from None

    @classmethod
    def from_json(cls, data: bytes) -> Tokenizer:
        """Return the tokenizer that the bytes of a `tokenizer.json` describe."""
        return cls(tokenizers.Tokenizer.from_str(data.decode()))

    def encode(self, text: str) -> list[int]:
        """Ids of a text; control tokens spelled out in it become their ids. No text, no ids."""
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """The text of ids, control tokens spelled out."""
        return str(self._inner.decode(ids, skip_special_tokens=False))

    def token_id(self, name: str) -> int:
        """Id of one token. Raises BundleError if the tokenizer lacks it."""
        id_ = self._inner.token_to_id(name)
        if id_ is None:
            raise BundleError(f"the tokenizer has no token {name!r}", hint="export the checkpoint again")
        return int(id_)

    def control_tokens(self, text: str) -> list[str]:
        """Names of the control tokens that a text would become, in order, each once."""
        return list(dict.fromkeys(self._control[id_] for id_ in self.encode(text) if id_ in self._control))
