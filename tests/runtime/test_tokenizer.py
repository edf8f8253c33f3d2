from __future__ import annotations

import pytest
import tokenizers

from fishrt.errors import BundleError
from fishrt.text.tokenizer import Tokenizer
from helpers_text import TINY_TOKENIZER


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(TINY_TOKENIZER)


def test_every_text_survives(tokenizer):
    for text in ("Hello, world!", "naïve 🙂 \r\n\t你好", "\x00\x01", "<|im_end|> and <|semantic:7|>", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("") == []


def test_a_file_cannot_make_it_cut_or_pad(tmp_path):
    inner = tokenizers.Tokenizer.from_file(str(TINY_TOKENIZER))
    inner.enable_truncation(3)
    inner.enable_padding(length=50)
    inner.save(str(tmp_path / "tokenizer.json"))
    text = "a text that is longer than three tokens"
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode(text) == Tokenizer.load(TINY_TOKENIZER).encode(text)


def test_control_tokens_are_named_once_in_order(tokenizer):
    text = "<|im_end|>a<|semantic:3|>b<|im_end|> <|speaker:0|> <|unknown|>"
    assert tokenizer.control_tokens(text) == ["<|im_end|>", "<|semantic:3|>"]


def test_unknown_token_is_named(tokenizer):
    with pytest.raises(BundleError, match="no_such"):
        tokenizer.token_id("<|no_such|>")


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe\x00", b'{"model": 3}'])
def test_bad_file_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Tokenizer.load(path)
