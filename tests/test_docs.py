"""README and docs/: links lead somewhere, pages build without a warning, and the site loads nothing from a network."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\(([^)\s]+)\)")
REPOSITORY = "https://github.com/fishrt/fishrt"
ALONE = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
"""Files that are also shown outside of the repository, where a relative link leads nowhere."""


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
    from fishrt.cli import main

    page = (site / "cli/index.html").read_text(encoding="utf-8")
    assert all(f"<code>fishrt {name}</code>" in page for name, command in main.commands.items() if not command.hidden)
    assert "--temperature" in page


def test_every_public_name_is_in_the_reference(site):
    import fishrt

    page = (site / "api/index.html").read_text(encoding="utf-8")
    assert [name for name in fishrt.__all__ if name != "__version__" and f"fishrt.{name}" not in page] == []
    assert "float32 [samples]" in page


def test_plots_and_links_out_of_the_folder_work_on_the_site(site):
    assert (site / "plots/cpu-frame.svg").is_file()
    assert f"{REPOSITORY}/blob/main/benchmarks/results/cpu.json" in (site / "speed/index.html").read_text(encoding="utf-8")


def test_the_site_loads_nothing_from_a_network(site):
    loaded = re.compile(r"<(?:script|img|iframe|link(?! rel=.?(?:canonical|edit)))[^>]*(?:src|href)=.?https?:[^>]*>")
    found = {match for page in site.rglob("*.html") for match in loaded.findall(page.read_text(encoding="utf-8"))}
    assert found == set()
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.findall(r"(?:url\(|@import)\s*['\"]?https?:", styles)
