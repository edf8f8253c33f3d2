"""README and docs/: commands and programs work as written, links are valid, the site needs no network."""

from __future__ import annotations

import ast
import asyncio
import re
import shlex
import shutil
from collections.abc import Iterator
from inspect import CO_COROUTINE
from pathlib import Path
from types import CodeType

import click
import pytest

import fishrt
import fishrt.errors
from fishrt.cli import main

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\(([^)\s]+)\)")
REPOSITORY = "https://github.com/fishrt/fishrt"
ALONE = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
"""Files that are also shown outside of the repository, where a relative link leads nowhere."""
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every call of fishrt in the pages: where it stands, and its arguments."""
    for page in PAGES:
        for line in "\n".join(blocks(page, "sh")).splitlines():
            for call in re.split(r" (?:\||&&|;|>) ", line):
                words = shlex.split(call, comments=True)
                if words[:1] == ["fishrt"]:
                    yield f"{page.name}: {call}", words[1:]


@pytest.mark.parametrize(("line", "words"), list(commands()))
def test_commands_are_spelt_as_the_program_takes_them(line, words):
    """Parsed, not run: a command or an option that does not exist is a usage error."""
    command: click.Command = main
    context = click.Context(main, info_name="fishrt")
    words = list(words)
    while isinstance(command, click.Group):
        name = words.pop(0)
        found = command.get_command(context, name)
        assert found is not None, f"there is no command {name}"
        parent, command = context, found
        context = click.Context(command, parent=parent, info_name=name)
    command.make_context(name, words, parent=parent)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_programs_run(page, monkeypatch, tmp_path):
    """One after the other, with the embedded voice in the place of every bundle."""
    awb = ROOT / "export/minnow/references/awb/reference.flac"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FISHRT_VOICE_DIR", str(tmp_path / "voices"))
    shutil.copy(awb, tmp_path / "anna.wav")
    (tmp_path / "voices/ben").mkdir(parents=True)
    shutil.copy(awb, tmp_path / "voices/ben/ben.flac")
    shutil.copy(awb.with_suffix(".lab"), tmp_path / "voices/ben/ben.lab")
    (tmp_path / "s1-mini-bundle").symlink_to(ROOT / "runtime/fishrt/minnow")
    heard: list[int] = []

    async def send(pcm) -> None:
        heard.append(len(pcm))

    names = {"play": lambda pcm: heard.append(len(pcm)), "send": send}
    for block in blocks(page, "python"):
        code: CodeType = compile(block, page.name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        result = eval(code, names)
        if code.co_flags & CO_COROUTINE:
            asyncio.run(result)
    made = "out/audio/one.wav" if page.name == "render.md" else "hello.wav"
    assert (tmp_path / made).stat().st_size > 20_000
    assert sum(heard) > 10_000 or page.name in ("quickstart.md", "render.md")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built documentation. Everything that MkDocs warns of is an error."""
    pytest.importorskip("mkdocs", reason="needs the dev extra")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


@pytest.mark.parametrize("name", ALONE)
def test_links_are_absolute_and_lead_to_files(name):
    links = LINK.findall((ROOT / name).read_text(encoding="utf-8"))
    assert [link for link in links if not link.startswith("https://")] == []
    for link in links:
        if link.startswith(f"{REPOSITORY}/blob/main/") or link.startswith(f"{REPOSITORY}/tree/main/"):
            path = link.removeprefix(REPOSITORY).split("/main/", 1)[1].split("#")[0]
            assert (ROOT / path).exists(), link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_command_has_its_help_on_the_page(site):
    page = (site / "cli/index.html").read_text(encoding="utf-8")
    assert all(f"<code>fishrt {name}</code>" in page for name, command in main.commands.items() if not command.hidden)
    assert "--temperature" in page


def test_every_public_name_is_in_the_reference(site):
    page = (site / "api/index.html").read_text(encoding="utf-8")
    assert [name for name in fishrt.__all__ if name != "__version__" and f"fishrt.{name}" not in page] == []
    assert "float32 [samples]" in page
    assert [name for name in fishrt.errors.__all__ if f">{name}<" not in page] == []
    assert [
        name for name in ("SpeechInfo", "PieceInfo", "Timings", "SpeechStream", "bundle_sha256") if f">{name}<" not in page
    ] == []


def test_plots_and_links_out_of_the_folder_work_on_the_site(site):
    assert (site / "plots/cpu-frame.svg").is_file()
    assert f"{REPOSITORY}/blob/main/benchmarks/results/cpu.json" in (site / "speed/index.html").read_text(encoding="utf-8")


def test_the_site_loads_nothing_from_a_network(site):
    loaded = re.compile(r"<(?:script|img|iframe|link(?! rel=.?(?:canonical|edit)))[^>]*(?:src|href)=.?https?:[^>]*>")
    found = {match for page in site.rglob("*.html") for match in loaded.findall(page.read_text(encoding="utf-8"))}
    assert found == set()
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.findall(r"(?:url\(|@import)\s*['\"]?https?:", styles)
