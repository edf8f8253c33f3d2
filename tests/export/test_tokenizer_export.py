"""Every family's tokenizer becomes a `tokenizer.json` with the ids that the original gave."""

from __future__ import annotations

import json
import random
import shutil
from base64 import b64encode
from pathlib import Path

import pytest
import tiktoken
import tokenizers

from fishrt.text.tokenizer import Tokenizer
from fishrt_export.checkpoint.families import FISH_1_5, S1
from fishrt_export.checkpoint.tokenizer import PATTERN, convert_tiktoken, read_ranks, read_tokenizer
from fishrt_export.errors import ExportError
from tiny import GoldenModel
from vectors import CHOSEN, find_golden

STRINGS = 12000
PIECES = (
    *("'s 'S 'ſ 'T 're 'LL 'd ' ?! ! ? ?!? _ - … — $ + ab aab b é é İ ß ﬆ Ⅷ ½ ١٢ 你好 今天 世界 👍🏽 👨‍👩‍👧 🎉 ǅ".split()),
    *(" ", "  ", " \t", "\n", "\r\n", "\r\n\r\n", "\u3000", "\u00a0", "\u0085", "\u2028", "\u200b", "\ufeff", "\x1c"),
    *("  ?!x", " ?!", "\n?!", "\t?! ", "<|im_end|>", "<|semantic:1|>", "<|im_end", "<|speaker:0|>", "|>"),
)


def random_text(rng: random.Random) -> str:
    """Return random text of pieces on which patterns differ, letters that merge, and any other characters."""
    parts = []
    for _ in range(rng.randint(0, 14)):
        kind = rng.random()
        if kind < 0.55:
            parts.append(rng.choice(PIECES))
        elif kind < 0.8:
            parts.append("".join(rng.choices("abAB the1' ", k=rng.randint(1, 8))))
        else:
            low, high = rng.choice(((0x20, 0x7F), (0x80, 0x3000), (0x3000, 0xD800), (0xE000, 0x110000), (0x10000, 0x20000)))
            parts.append(chr(rng.randrange(low, high)))
    return "".join(parts)


def random_ranks(rng: random.Random, alphabet: str, count: int) -> list[bytes]:
    """Return all bytes in random order and random tokens: most have parts that are no tokens, and some split characters."""
    tokens = [bytes([byte]) for byte in rng.sample(range(256), 256)]
    while len(tokens) < 256 + count:
        token = "".join(rng.choices(alphabet, k=rng.randint(2, 6))).encode()[: rng.randint(2, 8)]
        if token not in tokens:
            tokens.append(token)
    return tokens


@pytest.mark.parametrize("alphabet", [None, "ab '1", "abc今?! \n"], ids=["golden", "few letters", "many bytes"])
def test_ids_are_those_of_tiktoken(alphabet: str | None) -> None:
    rng = random.Random(7)
    golden = find_golden(CHOSEN, "fish-1.5") / "lm/checkpoint/tokenizer.tiktoken"
    tokens = read_ranks(golden) if alphabet is None else random_ranks(rng, alphabet, 600)
    control = {name: len(tokens) + i for i, name in enumerate(FISH_1_5.control_tokens)}
    ranks = {token: rank for rank, token in enumerate(tokens)}
    original = tiktoken.Encoding("original", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=control)
    ours = Tokenizer(convert_tiktoken(tokens, FISH_1_5.control_tokens))
    for _ in range(STRINGS // 3):
        text = random_text(rng)
        ids = original.encode(text, allowed_special="all")
        assert ours.encode(text) == ids, repr(text)
        assert ours.decode(ids) == original.decode(ids), repr(text)


@pytest.mark.parity
def test_ids_of_every_recorded_text(golden_model: GoldenModel, tmp_path: Path) -> None:
    meta = json.loads((golden_model.golden / "lm/meta.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(golden_model.lm.tokenizer, encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert meta["tokenizer_cases"]
    for case in meta["tokenizer_cases"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
    for name, id_ in meta["special_tokens"].items():
        assert tokenizer.token_id(name) == id_
    semantic = golden_model.lm.ids.semantic
    assert ([semantic[0], semantic[-1]], golden_model.lm.ids.end) == (meta["semantic_range"], meta["im_end_id"])


# ---- control tokens


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    """The ranks of the tiny S1, in a folder without other files."""
    return Path(shutil.copy(find_golden(None, "s1-mini") / "lm/checkpoint/tokenizer.tiktoken", tmp_path))


def ids_of(path: Path, family: object) -> dict[str, int]:
    added = json.loads(read_tokenizer(path, family))["added_tokens"]  # type: ignore[arg-type]
    return {token["content"]: token["id"] for token in added}


@pytest.mark.parametrize("family", [S1, FISH_1_5], ids=["s1", "1.5"])
def test_control_tokens_of_a_folder_without_a_list(ranks: Path, family: object) -> None:
    first = len(read_ranks(ranks))
    found = ids_of(ranks, family)
    assert list(found.values()) == list(range(first, first + len(found)))
    assert (found["<|begin_of_text|>"], found["<|im_end|>"]) == (first, first + 4)
    assert (found["<|semantic:0|>"] - first, len(found)) == ((15, 4111) if family is S1 else (12, 1036))


def test_the_order_of_a_list_counts_not_its_numbers(ranks: Path) -> None:
    listed = {"<|im_end|>": 7, "<|semantic:0|>": 3, "<|semantic:1|>": 5}
    ranks.with_name("special_tokens.json").write_text(json.dumps(listed), encoding="utf-8")
    first = len(read_ranks(ranks))
    assert ids_of(ranks, S1) == {name: first + i for i, name in enumerate(listed)}
    assert ids_of(ranks, FISH_1_5)["<|im_end|>"] == first + 4


# ---- damage


def test_blank_lines_and_the_empty_token_are_skipped(ranks: Path) -> None:
    tokens = read_ranks(ranks)
    ranks.write_text(ranks.read_text() + "\n\n= 99999\n")
    assert read_ranks(ranks) == tokens


def test_the_empty_token_counts_in_other_releases(ranks: Path) -> None:
    tokens = read_ranks(ranks)
    ranks.write_text(f"{ranks.read_text()}\n= {len(tokens)}\n")
    assert read_ranks(ranks, skips_empty=False) == [*tokens, b""]
    assert ids_of(ranks, FISH_1_5)["<|im_end|>"] == len(tokens) + 1 + 4
    with_it = tokenizers.Tokenizer.from_str(read_tokenizer(ranks, FISH_1_5))
    text = "Hello, world! 你好"
    assert with_it.encode(text).ids == convert_tiktoken(tokens, ()).encode(text).ids


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("IHQ=", "line 377 cannot be read: expected a token and its rank"),
        ("IHQ= 376 1", "line 377 cannot be read: expected"),
        ("IHQ 376", "line 377 cannot be read: .*padding"),
        ("I*Q= 376", "line 377 cannot be read"),
        ("//// x", "line 377 cannot be read: invalid literal"),
        ("//// 378", "the ranks of its 377 tokens are not 0, 1, 2"),
        ("AA== 376", "the ranks of its 376 tokens are not 0, 1, 2"),
    ],
)
def test_a_damaged_line(ranks: Path, line: str, message: str) -> None:
    ranks.write_text(ranks.read_text().rstrip("\n") + f"\n{line}\n")
    with pytest.raises(ExportError, match=message):
        read_tokenizer(ranks, S1)


def test_a_file_that_is_cut_off(ranks: Path) -> None:
    lines = "\n".join(f"{b64encode(bytes([byte])).decode()} {byte}" for byte in range(200))
    ranks.write_text(lines)
    with pytest.raises(ExportError, match="no token for 56 of the 256 bytes, first 0xc8"):
        read_ranks(ranks)
    ranks.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ExportError, match="cannot be read"):
        read_ranks(ranks)
