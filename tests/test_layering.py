"""engines ← runtime ← export: an arrow points at what may be imported. `import fishrt` loads nothing heavy."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from fishrt.bundle.folder import Bundle
from fishrt.cli import main

NEVER = {
    "fishrt_engines": {
        "fishrt",
        "fishrt_export",
        "minnow",
        "torch",
        "onnx",
        "onnxscript",
        "safetensors",
        "tokenizers",
        "soundfile",
    },
    "fishrt": {"fishrt_export", "minnow", "torch", "onnx", "onnxscript", "safetensors", "onnxruntime"},
    "fishrt_export": {"minnow"},
}
"""Modules that a layer must not import, not even inside a function."""
EXCEPTIONS = {("fishrt", "cli", "fishrt_export")}
"""The export command imports the exporter inside a function, so that only exports need torch."""
SERVING = {"fastapi", "starlette", "uvicorn", "pydantic", "pydantic_core"}
"""Modules that only the folder `server` imports."""
OWNED = {"server": SERVING, "scale": {"ray"}}
"""Modules that only one folder of the runtime imports."""
HEAVY = {"torch", "onnx", "onnxruntime", "onnxscript", "safetensors"}


def package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield top-level packages of absolute imports, also those imported by a call with a literal."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).split(".")[0]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__"):
                yield str(node.args[0].value).split(".")[0]


def at_module_level(tree: ast.Module) -> ast.Module:
    """The module without the bodies of its functions."""

    class Emptied(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
            node.body = [ast.Pass()]
            return node

    emptied = Emptied().visit(tree)
    assert isinstance(emptied, ast.Module)
    return emptied


def files() -> list[tuple[str, Path]]:
    return [(package, path) for package in NEVER for path in sorted(package_folder(package).rglob("*.py"))]


@pytest.mark.parametrize(("package", "path"), files(), ids=lambda value: value.name if isinstance(value, Path) else value)
def test_a_file_imports_only_from_its_own_and_lower_layers(package: str, path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    part = path.relative_to(package_folder(package)).parts[0].removesuffix(".py")
    allowed = {name for p, module, name in EXCEPTIONS if (p, module) == (package, part)}
    assert not set(imports(tree)) & NEVER[package] - allowed
    if package != "fishrt_export":
        assert not set(imports(at_module_level(tree))) & (HEAVY | allowed)


@pytest.mark.parametrize(("package", "path"), files(), ids=lambda value: value.name if isinstance(value, Path) else value)
def test_only_its_own_folder_imports_a_large_library(package: str, path: Path) -> None:
    part = path.relative_to(package_folder(package)).parts[0]
    for owner, modules in OWNED.items():
        assert (package, part) == ("fishrt", owner) or not set(imports(parsed(path))) & modules


@pytest.mark.parametrize(
    "line",
    [
        "import torch.nn",
        "from torch import nn",
        'importlib.import_module("torch.nn")',
        'x = import_module("torch")',
        '__import__("torch")',
    ],
)
def test_every_way_to_import_is_seen(line: str) -> None:
    assert list(imports(ast.parse(f"def f():\n    {line}"))) == ["torch"]


def test_the_layers_have_files() -> None:
    """With a wrong path, the test above would pass without checking anything."""
    assert {package for package, _ in files()} == set(NEVER)
    assert len(files()) > 15


RELEASE = re.compile(r"(?<![a-z0-9])(v?1[._][245]|s[12][-_ ]?(mini|pro)?|openaudio[a-z0-9]*)(?![a-z0-9])", re.IGNORECASE)


def spelled(tree: ast.AST) -> Iterator[str]:
    """Every name and text in a file but its docstrings."""
    described = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)}
    for node in ast.walk(tree):
        if id(node) not in described:
            yield from (value for _, value in ast.iter_fields(node) if isinstance(value, str))


@pytest.mark.parametrize("path", [path for package, path in files() if package == "fishrt"], ids=lambda path: path.name)
def test_the_runtime_asks_for_features_and_never_for_a_release(path: Path) -> None:
    assert [text for text in spelled(ast.parse(path.read_text(encoding="utf-8"))) if RELEASE.search(text)] == []


@pytest.mark.parametrize(
    "line",
    [
        'x.family == "s1"',
        "is_s2 = True",
        'f"{x} of 1.4"',
        "def f(fish_1_5): pass",
        "import openaudio_s1",
        "{'S1-mini': 1}",
        "x.v1_2",
        "f(s2=1)",
    ],
)
def test_every_way_to_name_a_release_is_seen(line: str) -> None:
    assert [text for text in spelled(ast.parse(line)) if RELEASE.search(text)]


@pytest.mark.parametrize("line", ['"""As S1 does."""', "x = 1.5", 'x: int\n"""Of 1.4."""', '"is1 11.4 1.45"'])
def test_what_names_no_release_is_not_taken_for_one(line: str) -> None:
    assert not [text for text in spelled(ast.parse(line)) if RELEASE.search(text)]


@pytest.mark.parametrize("module", ["fishrt", "fishrt_engines", "fishrt.cli"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({HEAVY | SERVING!r} & sys.modules.keys()))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert loaded == []


def test_speaking_needs_no_torch(tiny_bundle: Bundle) -> None:
    """In its own process, in which packages of the export cannot be imported. Speaking on a CPU loads nothing for TensorRT."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys({sorted(NEVER["fishrt"] - {"onnxruntime"})}))
import numpy as np
from fishrt import TTS
tts = TTS.load({str(tiny_bundle.path)!r}, provider="cpu", threads=1)
print(len(list(tts.stream("Hello!", max_frames=2))))
codes = tts.encode(np.zeros(3000, np.float32), tts.sample_rate)
print(len(tts.decode(codes)) >= 3000)
print(*(name for name in sys.modules if name.startswith("fishrt_engines.trt")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1", "True"], done.stderr


def test_importing_fishrt_is_cheap() -> None:
    code = "import sys, fishrt; print(*sorted({'numpy', 'soundfile', 'tokenizers'} & sys.modules.keys()))"
    assert not subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_a_start_imports_what_it_needs() -> None:
    """The first sound of the embedded voice: no files of audio, event loop, hub, other provider or other kind of model."""
    code = """
import sys
from fishrt import TTS
next(chunk for chunk in TTS.load(provider="cpu", threads=1).stream("Hi.", seed=1, max_frames=4) if len(chunk))
print(*sys.modules)
"""
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    others = {"asyncio", "ssl", "http", "click", "soundfile", "av", "huggingface_hub"} | SERVING | HEAVY - {"onnxruntime"}
    assert loaded & others == set()
    assert not {name for name in loaded if name.startswith(("fishrt.cli", "fishrt.server", "fishrt.bench", "fishrt_engines.trt"))}
    rooms = {
        name for name in loaded if name.startswith(("fishrt.diffusion.", "fishrt.hub.", "fishrt.kinds.", "fishrt_engines.ort."))
    }
    assert rooms == {
        *("fishrt.diffusion.denoising", "fishrt.diffusion.text", "fishrt.hub.repository"),
        *(f"fishrt.kinds.{name}" for name in ("columns", "dual_ar", "model")),
        *(f"fishrt_engines.ort.{name}" for name in ("engine", "packed", "session", "tensors")),
    }


def test_the_public_names_are_there() -> None:
    import fishrt

    assert all(hasattr(fishrt, name) for name in fishrt.__all__)
    assert len(fishrt.__all__) <= 12
    with pytest.raises(AttributeError, match="no attribute 'Speach'"):
        fishrt.Speach  # noqa: B018


@pytest.mark.parametrize("path", [path for package, path in files() if package == "fishrt_engines"], ids=lambda path: path.name)
def test_engines_name_no_command_and_no_model_of_ours(path: Path) -> None:
    """The runtime adds such hints; names of pip extras are allowed."""
    assert names_of_ours(path.read_text(encoding="utf-8")) == []


def names_of_ours(text: str) -> list[str]:
    return re.findall(rf"\bfishrt (?:{'|'.join(main.commands)})\b|minnow|slow_ar|fast_ar", text)


def test_every_way_to_name_a_command_is_seen() -> None:
    assert names_of_ours('"run `fishrt build-trt`, fishrt doctor; pip install fishrt[cpu]; fishrt plans" # minnow') == [
        "fishrt build-trt",
        "fishrt doctor",
        "minnow",
    ]


MOST_LINES, MOST_LINES_OF_A_FOLDER = 400, 1650


@pytest.mark.parametrize("package", NEVER)
def test_no_file_and_no_folder_is_too_long(package: str) -> None:
    folders: dict[str, int] = {}
    for path in (path for p, path in files() if p == package):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= MOST_LINES, path
        folder = str(path.parent.relative_to(package_folder(package)))
        folders[folder] = folders.get(folder, 0) + lines
    assert {folder: lines for folder, lines in folders.items() if lines > MOST_LINES_OF_A_FOLDER} == {}


ROOMS = {
    "fishrt_engines": (
        {"errors"},
        {"aside", "engine", "folders", "machine"},
        {"providers"},
        {"cache"},
        {"ort"},
        {"trt"},
        {"doctor", "open"},
    ),
    "fishrt": (
        {"arrays", "errors", "metrics", "progress", "version"},
        {"hub", "jobs"},
        {"audio", "bundle"},
        {"text", "codec"},
        {"voices"},
        {"language_model", "diffusion"},
        {"request", "speech"},
        {"speaking"},
        {"kinds"},
        {"tts"},
        {"bench", "bulk", "scale", "server"},
        {"cli"},
    ),
    "fishrt_export": (
        {"errors", "place"},
        {"checkpoint", "options"},
        {"models"},
        {"graph"},
        {"sources", "targets"},
        {"planning"},
        {"export", "retarget"},
    ),
}
"""The files and folders of a layer, from the lowest rank to the highest: each imports from its own rank and below."""
ALONE = {"__init__", "__main__"}
"""The public names and the entry point stand above all ranks."""


def rooms_imported(package: str, path: Path) -> set[tuple[str, str]]:
    """The room of a file, with each room of its package that it imports; not those for types alone."""
    place = path.relative_to(package_folder(package)).with_suffix("").parts
    typing = {id(node) for block in ast.walk(parsed(path)) if is_for_types(block) for node in ast.walk(block)}
    found = set()
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.ImportFrom) or id(node) in typing:
            continue
        module = str(node.module or "").split(".") if node.module else []
        base = [package, *place[:-1]][: len(place) - node.level + 1] if node.level else []
        match [*base, *module]:
            case [top, room, *_] if top == package:
                found.add((place[0], room))
            case [top] if top == package:
                found |= {(place[0], alias.name) for alias in node.names}
    return {(room, other) for room, other in found if room != other}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@pytest.mark.parametrize("package", ROOMS)
def test_every_room_has_a_rank(package: str) -> None:
    rooms = {path.relative_to(package_folder(package)).parts[0].removesuffix(".py") for p, path in files() if p == package}
    assert rooms - ALONE == set[str]().union(*ROOMS[package])


@pytest.mark.parametrize("package", ROOMS)
def test_a_room_imports_only_from_its_own_rank_and_below(package: str) -> None:
    rank = {room: n for n, rooms in enumerate(ROOMS[package]) for room in rooms}
    edges = set[tuple[str, str]]().union(*(rooms_imported(package, path) for p, path in files() if p == package))
    edges = {(room, other) for room, other in edges if not {room, other} & ALONE}
    assert edges
    assert not {(room, other) for room, other in edges if rank[room] < rank[other]}
