"""Warnings about text that a model does not read well: letters, digits, signs and tags."""

from __future__ import annotations

import unicodedata

import pytest

from fishrt import TTS, Bundle
from fishrt.bundle.features import Reads
from fishrt.bundle.folder import embedded_bundle
from fishrt.bundle.manifest import Manifest
from fishrt.errors import BundleError
from fishrt.text.reading import unread
from fishrt.text.scripts import script, scripts_of
from helpers_text import language_model, manifest

ENGLISH = Reads(("en",), "abcdefghijklmnopqrstuvwxyz", ())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The quick brown fox, isn't it? — Yes: “Really”! (see below) well…", []),
        ("It costs 35 dollars, or 53.", ["digits 3, 5"]),
        ("你好,世界。", ["letters 你, 好, 世, 界"]),
        ("Café, cafe\u0301", ["letters é"]),
        ("$5 & 3 € = 100%", ["digits 5, 3, 1, 0", "signs $, &, €, =, %"]),
        ("Hi 🙂", ["signs 🙂"]),
        ("Ｈｉ", ["letters Ｈ, ｉ"]),
        (
            "<b>Hello</b> <break/> [laughing] (Excited) (in a hurry tone)",
            ["tags [laughing], (Excited), (in a hurry tone), <b>, </b>, <break/>"],
        ),
        ("<|speaker:1|>Hi. <|speaker:12|>Oh.", []),
        ("a < b", ["signs <"]),
        ("See [1] and (2).", ["digits 1, 2"]),
        ("абвгдежзийкл", ["letters а, б, в, г, д, е, ж, з, и, й, …"]),
    ],
)
def test_outside_the_characters_of_a_model(text: str, found: list[str]) -> None:
    assert unread(text, ENGLISH) == found


@pytest.mark.parametrize(
    ("languages", "text", "found"),
    [
        ("en zh ja", "Hello 你好 こんにちは カタカナー 々 ＡＢＣ 10 € ½ é", []),
        ("en zh ja", "Привет!", ["letters П, р, и, в, е, т"]),
        ("en ru", "Привет! Hello! Ёж", []),
        ("en ko", "안녕하세요 漢字", []),
        ("en ko", unicodedata.normalize("NFD", "안녕"), []),
        ("en ar", "مَرْحَبًا", []),
        ("en ar", "שָׁלוֹם", ["letters ש, ל, ו, ם"]),
        ("en zh-Hant pt-BR", "你好 ção", []),
        ("en tlh", "नमस्ते", []),  # nothing is known of the second
        ("", "नमस्ते", []),
    ],
)
def test_outside_the_languages_of_a_model(languages: str, text: str, found: list[str]) -> None:
    assert unread(text, Reads(tuple(languages.split()), None, ())) == found


@pytest.mark.parametrize(
    ("forms", "found"), [((), ["tags [laughing], (laughing)"]), (("[]",), ["tags (laughing)"]), (("()",), ["tags [laughing]"])]
)
def test_tags_that_a_model_knows_are_not_named(forms: tuple[str, ...], found: list[str]) -> None:
    assert unread("[laughing] Hello (laughing)", Reads((), None, forms)) == found


def test_scripts() -> None:
    assert [script(c) for c in "aＡ你ーｱ한é٣"] == ["LATIN", "LATIN", "CJK", "KATAKANA", "KATAKANA", "HANGUL", "LATIN", "ARABIC"]
    assert script("\x00") == ""
    assert scripts_of(["en", "ru"]) == {"LATIN", "CYRILLIC"}
    assert scripts_of(["en", "xx"]) is None


def test_the_embedded_voice_warns_once_and_names_them() -> None:
    with TTS.load(embedded_bundle()) as tts:
        plain, odd = tts.stream("Please close the door.").info, tts.stream("Привет! Room 12. <break/> Room 21.").info
    assert plain.warnings == ()
    assert odd.warnings == ("minnow does not read well: letters П, р, и, в, е, т; digits 1, 2; tags <break/>",)


def test_a_manifest_of_before_knows_nothing_and_warns_of_nothing() -> None:
    bundle = Bundle.load(embedded_bundle())
    text = manifest().to_json()
    assert '"reads": null' in text
    older = Manifest.from_json(text.replace(',\n  "reads": null', ""))
    assert older.model.reads is None
    assert bundle.manifest.model.reads == ENGLISH


def test_a_form_of_tags_that_is_not_known_is_refused() -> None:
    with pytest.raises(BundleError, match=r"reads\.tags is '\{\}'; known are \[\], \(\)"):
        manifest(model=language_model(reads=Reads((), None, ("{}",)))).check()
