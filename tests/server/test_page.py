"""The page: its files as the server sends them. test_page_browser.py has how it works in a browser."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

import fishrt.server.page
from fishrt import TTS
from fishrt.server.diffusion.fields import KEYS
from fishrt.server.speech.fields import SpeechFields

FOLDER = Path(fishrt.server.page.__file__).parent
FILES = sorted(path.name for path in FOLDER.iterdir() if path.suffix not in (".py", "") and path.name != "index.html")
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}
INDEX = (FOLDER / "index.html").read_text(encoding="utf-8")


def source(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def address(name: str) -> str:
    return "/" if name == "index.html" else f"/page/{name}"


@pytest.mark.parametrize("name", ["index.html", *FILES])
def test_a_file_is_sent_with_its_type_and_only_when_it_is_new(client: TestClient, name: str) -> None:
    reply = client.get(address(name))
    assert (reply.status_code, reply.text) == (200, source(name))
    assert reply.headers["content-type"].split(";")[0] == TYPES[Path(name).suffix]
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["cache-control"] == "no-cache"
    tag = reply.headers["etag"]
    for held in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = client.get(address(name), headers={"If-None-Match": held})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert client.get(address(name), headers={"If-None-Match": '"other"'}).status_code == 200
    head = client.head(address(name))
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", tag)


def test_the_page_may_load_from_its_own_server_only(client: TestClient) -> None:
    policy = dict(part.strip().split(" ", 1) for part in client.get("/").headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert not [part for part in policy.values() if "http" in part or "unsafe" in part or "*" in part]


@pytest.mark.parametrize(
    "path",
    ["/page/nothing.js", "/page/__init__.py", "/page/index.html", "/page/../app.py", "/page/..%2Fapp.py", "/page/", "/page"],
)
def test_nothing_else_is_sent(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_the_page_needs_no_key_and_says_whether_the_server_does(client: TestClient, start: Callable[..., TestClient]) -> None:
    locked = start(api_key="secret")
    assert [locked.get(address(name)).status_code for name in ("index.html", *FILES)] == [200] * (len(FILES) + 1)
    assert locked.get("/health").json()["needs_key"] is True
    assert client.get("/health").json()["needs_key"] is False


def test_the_model_says_what_the_page_shows(client: TestClient, tts: TTS) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert {key: model[key] for key in ("family", "languages", "sample_rate", "speakers", "voice_seconds", "sampling")} == {
        "family": "Fish Audio S2-Pro",
        "languages": ["en"],
        "sample_rate": 16000,
        "speakers": True,
        "voice_seconds": [2.0, 5.0],
        "sampling": {"temperature": 0.6, "top_p": 0.8, "top_k": 20, "repetition_penalty": None},
    }
    assert client.get(f"/v1/models/{model['id']}").json() == model


@pytest.mark.parametrize("name", ["index.html", *FILES])
def test_sources_name_no_other_host_and_no_absolute_path(name: str) -> None:
    text = source(name).replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"\w+://|url\(|@import", text)
    assert not re.search(r"""(?:src|href|action)="[/#]|["'`]/(?:v1|page|health)|from "(?!\./)""", text)
    assert not re.search(r"\sstyle=|<style|\son\w+=\"|innerHTML|eval\(", text), "the policy allows no code and style in elements"


def test_scripts_use_what_is_there() -> None:
    ids = re.findall(r'\bid="([\w-]+)"', INDEX)
    assert len(ids) == len(set(ids))
    scripts = "".join(source(name) for name in FILES if name.endswith(".js"))
    assert set(re.findall(r'byId\("([\w-]+)"\)', scripts)) <= set(ids)
    assert set(re.findall(r' from "\./([\w.]+)"', scripts)) | {"main.js"} == {name for name in FILES if name.endswith(".js")}
    assert set(re.findall(r'(?:src|href)="page/([\w.]+)"', INDEX)) == {"icon.svg", "style.css", "main.js"}
    assert set(re.findall(r'\b(?:for|aria-labelledby)="([\w-]+)"', INDEX)) <= set(ids)


def test_settings_are_fields_of_requests() -> None:
    form = INDEX[INDEX.index('<form id="settings">') :].partition("</form>")[0]
    names = set(re.findall(r' name="(\w+)"', form))
    assert {"seed", "preset"} < names <= SpeechFields.model_fields.keys() | KEYS
