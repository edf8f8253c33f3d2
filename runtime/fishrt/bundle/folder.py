"""A bundle on disk: `manifest.json`, the graphs with their weights, the tokenizer, and perhaps built-in voices.

The manifest holds everything about a model that the runtime needs, so that no code asks which release it is running. It is
strict: an unknown key, a missing key and a value out of range are errors that name it. `Bundle.load` checks sizes; `verify`
hashes every file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from fishrt_engines.engine import GraphSpec

from ..errors import BundleError
from ..hub.repository import is_reference
from .features import Codec, LanguageModel
from .fetched import bundle_folder

SCHEMA = 3
MANIFEST = "manifest.json"
ROLES = ("slow_ar", "fast_ar", "codec_encode", "codec_decode")
PRECISIONS = ("fp32", "fp16", "int8", "int4")
"""Formats of stored weights. fp32: as in the checkpoint, maybe in 16 bits. The computation is in float32 in any case."""
T = TypeVar("T")
AGAIN = "copy the bundle again, or export the checkpoint again"
"""The hint for a damaged file of a bundle."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size in bytes and SHA-256 of one file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Parity:
    """The largest error of a graph against the torch module, measured by the export.

    For numbers, the absolute difference, divided by max(1, largest value ÷ 50). For codes, the margin by which the module
    preferred another code: 0 if all were equal.
    """

    max_abs_error: float
    tolerance: float
    provider: str

    def summary(self, graph: GraphSpec) -> str:
        """Return the error in words. graph: the graph that was measured."""
        if {tensor.dtype for tensor in graph.results} != {"int64"}:
            return f"largest error {self.max_abs_error:.2g} of {self.tolerance:g} allowed"
        if not self.max_abs_error:
            return "0 codes differ"
        return f"codes differ where the choice was unclear, by a margin of {self.max_abs_error:.2g} of {self.tolerance:g} allowed"


@dataclass(frozen=True, slots=True)
class Licence:
    """Terms of the weights. `file` is the notice inside the bundle, if the checkpoint had one."""

    name: str
    file: str | None


@dataclass(frozen=True, slots=True)
class Voices:
    """Voices shipped with the bundle, in `voices/<name>/`; `default` speaks if a request names none."""

    default: str
    names: tuple[str, ...]

    @property
    def ordered(self) -> tuple[str, ...]:
        """All names, the default first: voice i speaks `<|speaker:i|>` if a request names no voice."""
        return (self.default, *(name for name in self.names if name != self.default))


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of `manifest.json`."""

    schema: int
    name: str
    """For people only."""
    exported_by: str
    language_model: LanguageModel
    codec: Codec
    tokenizer: str
    """File name of the tokenizer."""
    graphs: dict[str, GraphSpec]
    """Graphs by role: all of ROLES."""
    precision: dict[str, str]
    """Format of most of a graph's weights, one of PRECISIONS, by role."""
    memory: dict[str, int]
    """Bytes of a graph's weights after ONNX Runtime has loaded it for a CPU, by role."""
    parity: dict[str, Parity]
    licence: Licence
    voices: Voices | None
    files: dict[str, FileEntry]
    family: str = ""
    """Releases whose layout the checkpoint has, for people only. Empty, like `recipe`, in a bundle of an earlier version."""
    recipe: str = ""
    """Options of `fishrt export`, for people only: the precision, then those that differ from the defaults."""

    @property
    def total_bytes(self) -> int:
        """Size of all files together."""
        return sum(entry.bytes for entry in self.files.values())

    def identity(self, role: str, *more: str) -> str:
        """Return a hash, in hex, of one graph and its weights, and of the files `more` that another form of it adds."""
        file = self.graphs[role].file
        hashes = [self.files[name].sha256 for name in (file, f"{file}.data", *more) if name in self.files]
        return hashlib.sha256(" ".join(hashes).encode()).hexdigest()

    def check(self) -> None:
        """Check all values. Raises one BundleError that lists those that are out of range or contradict each other."""
        lm, codec = self.language_model, self.codec
        faults = [*lm.faults(), *codec.faults()]
        rules = (
            (
                lm.num_codebooks <= len(codec.codebook_sizes),
                f"num_codebooks is {lm.num_codebooks}, but there are {len(codec.codebook_sizes)} codebook_sizes",
            ),
            (
                self.graphs.keys() == set(ROLES),
                f"the graphs are {', '.join(self.graphs) or 'none'}; they must be {', '.join(ROLES)}",
            ),
            (
                self.precision.keys() == set(ROLES) and set(self.precision.values()) <= set(PRECISIONS),
                f"the precision is {self.precision}; it must name one of {', '.join(PRECISIONS)} for each graph",
            ),
            (
                self.memory.keys() == set(ROLES) and min(self.memory.values()) >= 0,
                f"the memory is {self.memory}; it must give bytes for each graph",
            ),
            (
                self.voices is None or self.voices.default in self.voices.names,
                f"the default voice {self.voices and self.voices.default!r} is not among the voices",
            ),
        )
        faults += [says for holds, says in rules if not holds] or self._misfits()
        if faults:
            raise BundleError(f"{MANIFEST} cannot be right: {'; '.join(faults)}", hint="update fishrt, or export again")

    def _misfits(self) -> list[str]:
        """Return a message for each tensor whose second dimension contradicts the manifest. All ROLES must be there."""
        lm, books = self.language_model, len(self.codec.codebook_sizes)
        rows = lm.vocab_size if lm.head == "full" else lm.semantic_end_id - lm.semantic_begin_id + 2
        widths = (
            ("slow_ar", "prompt", 1 + lm.num_codebooks),
            ("slow_ar", "logits", rows),
            ("fast_ar", "logits", lm.codebook_width),
            ("codec_encode", "codes", books),
            ("codec_decode", "codes", books),
        )
        faults = []
        for role, name, width in widths:
            spec = self.graphs[role]
            shapes = [tensor.shape for tensor in (*spec.inputs, *spec.outputs) if tensor.name == name]
            if not shapes or len(shapes[0]) < 2 or shapes[0][1] != width:
                faults.append(
                    f"{name} of {role} is {list(shapes[0]) if shapes else 'missing'}, expected a second dimension of {width}"
                )
        return faults

    def to_json(self) -> str:
        """Return the text of `manifest.json`."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read the text of a `manifest.json`.

        Raises BundleError for text that is not JSON, another schema, a missing, unknown or mistyped key, and as `check`.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{MANIFEST} is not JSON: {error}", hint="export the checkpoint again") from None
        schema = data.get("schema") if isinstance(data, dict) else None
        if not isinstance(schema, int):
            raise BundleError(f"{MANIFEST} has no schema number", hint="is this a fishrt bundle?")
        if schema != SCHEMA:
            newer = schema > SCHEMA
            raise BundleError(
                f"{MANIFEST} has schema {schema}; this version reads schema {SCHEMA}",
                hint="update fishrt" if newer else "export the checkpoint again with this version",
            )
        manifest = parse_dataclass(cls, data, "manifest")
        manifest.check()
        return manifest


@dataclass(frozen=True, slots=True)
class Bundle:
    """A complete bundle.

    Attributes:
        path: its folder.
        manifest: the content of its `manifest.json`.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def load(cls, path: str | Path) -> Bundle:
        """Read the manifest of a folder, or of `hf:OWNER/NAME[@REVISION]`, which is downloaded once into the hub's cache.

        Every file must be there and have the right size. A graph or weights that the manifest does not list are an error: ONNX
        Runtime would read them. Raises BundleError, and HubError if a repository cannot be downloaded.
        """
        folder = bundle_folder(path) if is_reference(path) else Path(path)
        bundle = cls(folder, Manifest.from_json(_read_manifest(folder)))
        for name, entry in bundle.manifest.files.items():
            file = bundle.file(name)
            size = file.stat().st_size if os.path.isfile(file) else None  # noqa: PTH113  # no error for a name that no file can have
            if size != entry.bytes:
                found = "is missing" if size is None else f"has {size:,} bytes instead of {entry.bytes:,}"
                raise BundleError(f"{file} {found}", hint=AGAIN)
        wanted = [bundle.manifest.tokenizer, *(g.file for g in bundle.manifest.graphs.values())]
        if missing := [name for name in wanted if name not in bundle.manifest.files]:
            raise BundleError(f"{MANIFEST} names files that it does not list: {', '.join(missing)}", hint=AGAIN)
        weights = {f"{graph.file}.data" for graph in bundle.manifest.graphs.values()}
        strange = [
            name
            for name in iter_file_names(folder)
            if name not in bundle.manifest.files and (name in weights or name.endswith((".onnx", ".onnx.data")))
        ]
        if strange:
            raise BundleError(
                f"{folder} holds files that its {MANIFEST} does not list: {', '.join(strange)}",
                hint="remove them, or export the checkpoint again",
            )
        return bundle

    def file(self, name: str) -> Path:
        """Return the path of a file of the bundle. Raises BundleError for a name that leads out of the folder."""
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or not pure.parts:
            raise BundleError(f"{MANIFEST} names a file outside the bundle: {name!r}", hint=AGAIN)
        return self.path.joinpath(*pure.parts)

    def verify(self, progress: Callable[[int], None] = lambda _: None) -> None:
        """Hash every file; `progress` receives the bytes of each piece. Raises BundleError that names the first altered one."""
        for name, entry in self.manifest.files.items():
            if sha256(self.file(name), progress) != entry.sha256:
                raise BundleError(f"{self.file(name)} was altered: its SHA-256 is not the one in {MANIFEST}", hint=AGAIN)


def _read_manifest(folder: Path) -> str:
    """Return the text of the manifest. Raises BundleError with a description of a path that is no bundle."""
    path, wanted = folder / MANIFEST, "the folder that `fishrt export` wrote"
    try:
        if not folder.exists():
            raise BundleError(f"{folder} does not exist", hint=f"give {wanted}, or hf:OWNER/NAME")
        if not folder.is_dir():
            raise BundleError(f"{folder} is a file, not a bundle", hint=f"give {wanted}")
        if not path.exists():
            if (folder / "config.json").exists():
                first = f"fishrt export {shlex.quote(str(folder))} BUNDLE"
                raise BundleError(f"{folder} is a checkpoint, not a bundle", hint=f"first: {first}")
            raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}", hint=f"give {wanted}")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}", hint="check its permissions") from None
    except UnicodeDecodeError:
        raise BundleError(f"{path} is not UTF-8", hint=AGAIN) from None


def embedded_bundle() -> Path:
    """Return the folder of the bundle that is shipped with fishrt. Raises BundleError if there is none."""
    folder = Path(__file__).resolve().parents[1] / "minnow"
    if not folder.is_dir():
        raise BundleError("this installation has no embedded voice", hint="give a bundle: the folder that `fishrt export` wrote")
    return folder


def sha256(path: Path, progress: Callable[[int], None] = lambda _: None) -> str:
    """Return the SHA-256 of a file in hex; `progress` receives the bytes of each piece that is read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def _parse(kind: Any, value: Any, where: str) -> Any:
    """Return `value` from JSON as the type `kind`: dataclasses, dict[str, X], tuple[X, ...], unions and plain values."""
    if is_dataclass(kind):
        return parse_dataclass(kind, value, where)  # type: ignore[arg-type]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            if option is type(None) and value is None:
                return None
            if option is not type(None) and value is not None and _fits(option, value):
                return _parse(option, value, where)
    elif origin is dict and isinstance(value, dict):
        return {key: _parse(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    elif origin is tuple and isinstance(value, list):
        return tuple(_parse(arguments[0], item, f"{where}[{n}]") for n, item in enumerate(value))
    elif _fits(kind, value):
        return float(value) if kind is float else value
    raise BundleError(f"{where} is {value!r}; expected {_kind_name(kind)}", hint="export the checkpoint again")


def read_listed(bundle: Bundle, name: str, kind: type[T]) -> T | None:
    """Read a dataclass from a JSON file of the bundle; return None if it lists no such file. Raises BundleError if invalid."""
    if name not in bundle.manifest.files:
        return None
    path = bundle.file(name)
    try:
        return parse_dataclass(kind, json.loads(path.read_text(encoding="utf-8")), name)
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read: {error}", hint=AGAIN) from None


def parse_dataclass(kind: type[T], value: Any, where: str) -> T:
    """Return a dataclass from decoded JSON, strictly. where: the name of `value` in messages. Raises BundleError."""
    if not isinstance(value, dict):
        raise BundleError(f"{where} is {value!r}; expected an object", hint=AGAIN)
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(value.keys() - known.keys()):
        raise BundleError(f"{where} has unknown keys: {', '.join(unknown)}", hint="update fishrt, or export again")
    required = {name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(required - value.keys()):
        raise BundleError(f"{where} lacks the keys: {', '.join(missing)}", hint="export the checkpoint again")
    return kind(**{name: _parse(hints[name], item, f"{where}.{name}") for name, item in value.items()})


def _fits(kind: Any, value: Any) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if is_dataclass(kind) or typing.get_origin(kind) is dict:
        return isinstance(value, dict)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, list)
    return typing.get_origin(kind) is not None or isinstance(value, kind)


def _kind_name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))


def iter_file_names(folder: Path) -> Iterator[str]:
    """Yield every file under a folder except the manifest: relative, with forward slashes, sorted."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            yield path.relative_to(folder).as_posix()


def describe_files(folder: Path) -> Mapping[str, FileEntry]:
    """Return the `files` entry of a manifest for all files of a folder."""
    return {name: FileEntry((folder / name).stat().st_size, sha256(folder / name)) for name in iter_file_names(folder)}
