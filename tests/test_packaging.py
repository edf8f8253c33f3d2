"""The published files and metadata, as hatchling lists them. Nothing is built."""

from __future__ import annotations

import re
from importlib.metadata import distributions
from pathlib import Path

import pytest

import fishrt

pytest.importorskip("hatchling", reason="needs the dev extra")

from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from hatchling.metadata.core import CoreMetadata, ProjectMetadata
from hatchling.plugin.manager import PluginManager
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
PACKAGES = {"fishrt", "fishrt_engines", "fishrt_export"}


def listed(builder: type[WheelBuilder] | type[SdistBuilder]) -> dict[str, int]:
    """Path inside the package → size in bytes."""
    files = builder(str(ROOT)).recurse_included_files()
    return {Path(file.distribution_path).as_posix(): Path(file.path).stat().st_size for file in files}


@pytest.fixture(scope="module")
def wheel() -> dict[str, int]:
    return listed(WheelBuilder)


@pytest.fixture(scope="module")
def sdist() -> dict[str, int]:
    return listed(SdistBuilder)


def test_the_wheel_holds_the_packages_and_the_embedded_voice(wheel):
    assert {name.split("/")[0] for name in wheel} == PACKAGES
    assert {
        "fishrt/tts.py",
        "fishrt_engines/ort/engine.py",
        "fishrt_export/export.py",
        "fishrt/minnow/manifest.json",
    } <= wheel.keys()
    assert {f"{package}/py.typed" for package in PACKAGES} <= wheel.keys()
    voice = {
        path.relative_to(ROOT / "runtime").as_posix() for path in (ROOT / "runtime/fishrt/minnow").rglob("*") if path.is_file()
    }
    assert voice <= wheel.keys()
    assert {f"fishrt/server/page/{name}" for name in ("index.html", "style.css", "main.js", "icon.svg")} <= wheel.keys()


def test_the_recipe_of_the_embedded_voice_is_not_published(wheel, sdist):
    assert not [name for name in (*wheel, *sdist) if name.startswith(("export/minnow", "minnow")) or "recipe" in name.split("/")]


def test_a_wheel_from_the_sdist_is_complete(wheel, sdist):
    tops = {"fishrt": "runtime", "fishrt_engines": "engines", "fishrt_export": "export"}
    assert {f"{tops[name.split('/')[0]]}/{name}" for name in wheel} <= sdist.keys()


def test_the_sdist_is_little_more_than_the_wheel(wheel, sdist):
    assert {name.split("/")[0] for name in sdist if "/" in name} == {"deploy", "docs", "engines", "examples", "export", "runtime"}
    assert sum(sdist.values()) < sum(wheel.values()) + 2_000_000


@pytest.fixture(scope="module")
def core() -> CoreMetadata:
    return ProjectMetadata(str(ROOT), PluginManager()).core


def test_the_metadata_says_who_where_and_for_whom(core):
    assert core.authors == [{"name": "The fishrt authors"}]
    assert {"Homepage", "Documentation", "Repository", "Issues", "Changelog"} == core.urls.keys()
    assert all(url.startswith(core.urls["Repository"]) for url in core.urls.values())
    assert core.keywords
    assert core.license_expression == "Apache-2.0"
    assert set(core.optional_dependencies) == {"cpu", "cuda", "trt", "play", "ray", "retarget", "server", "export", "dev"}
    assert all(core.optional_dependencies.values()), "an extra that installs nothing"
    lowest = re.fullmatch(r">=3\.(\d+).*", core.requires_python)
    assert lowest
    versions = [int(c.removeprefix("Programming Language :: Python :: 3.")) for c in core.classifiers if ":: 3." in c]
    assert min(versions) >= int(lowest[1])


def test_the_citation_names_the_version():
    assert f"\nversion: {fishrt.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_package_of_the_dev_extra_is_pinned(core):
    """So that `make` gives everybody the same environment."""
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    extras = core.optional_dependencies
    specs = [spec for name in ("cpu", "export", "server", "ray", "dev") for spec in extras[name]]
    wanted = {re.split(r"[\[<>=]", spec)[0].lower() for spec in specs}
    assert wanted - {"fishrt"} <= pinned


def test_every_pinned_version_can_be_installed_on_the_oldest_python(core):
    """3.11.0: the Python of Debian 12 is 3.11.2, and some packages ask for a later bug fix release."""
    oldest = core.requires_python.removeprefix(">=") + ".0"
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    installed = [d for d in distributions() if pins.get(d.name) == d.version]
    if len(installed) < len(pins) / 2:
        pytest.skip("needs the versions of constraints.txt")
    needs = {d.name: d.metadata["Requires-Python"] or "" for d in installed}
    assert [f"{name} {need}" for name, need in needs.items() if oldest not in SpecifierSet(need)] == []
