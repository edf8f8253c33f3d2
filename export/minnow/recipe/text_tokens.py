"""The tokenizer of the embedded voice: one token for each byte, control string and long fixed phrase of the prompt.

A small model learns to read from single letters. Every prompt has the same phrases, so each is one token.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from .config import CODEC

CONTROL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|pad|>",
    "<|phoneme_start|>",
    "<|phoneme_end|>",
    "<|text|>",
    "<|voice|>",
    "<|interleave|>",
    "<|audio_start|>",
    "<|audio_end|>",
    "<|audio_pad|>",
)
PHRASES = (
    "convert the provided text to speech reference to the following:\n\nText:\n",
    "\n\nSpeech:\n",
    *(f"<|speaker:{n}|>" for n in range(10)),
)


def build_tokenizer() -> Tokenizer:
    """Return the tokenizer. Its ids are 256 bytes, then PHRASES, CONTROL and the entries of the semantic codebook."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: n for n, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(p, normalized=False) for p in PHRASES])
    semantic = [f"<|semantic:{n}|>" for n in range(CODEC["quantizer"]["semantic_codebook_size"])]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in (*CONTROL, *semantic)])
    return tokenizer


def token_id(tokenizer: Tokenizer, name: str) -> int:
    """Return the id of a token. Raises KeyError if there is none."""
    found: int | None = tokenizer.token_to_id(name)
    if found is None:
        raise KeyError(name)
    return found
