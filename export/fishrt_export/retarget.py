"""Forms for further providers in a finished bundle, without torch. A bundle of schema 3 becomes one of this schema.

A form is compared with its portable graph, which the export compared with torch: its error is at most the sum of both.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from fishrt.bundle.diffusion import Diffusion
from fishrt.bundle.folder import Bundle, describe_file
from fishrt.bundle.manifest import MANIFEST, SCHEMA, TARGETS, Form, Graph, Manifest, Parity
from fishrt.bundle.strict import AGAIN, parse_dataclass
from fishrt.errors import BundleError
from fishrt.hub.repository import is_reference
from fishrt.progress import Progress
from fishrt_engines import open_engine
from fishrt_engines.aside import new_folder

from .checkpoint.identify import AudioIds
from .errors import ExportError, check_known
from .graph.report import PROVIDER, Case, Expected, compare, exact, exact_file, run
from .options import with_targets
from .place import check_replaceable
from .sources.cases import codec_decode_cases, codec_encode_cases, fast_ar_cases, slow_ar_cases
from .sources.echo_cases import diffusion_cases
from .targets.coreml import check_codec, static_form, step_usability
from .targets.forms import make_forms

SIDE_FILES = ("static.json", "int8_codec.json", "quantisation.json")
"""Files of a bundle of schema 3 whose content is in the manifest now."""
SIGHT = 40
"""Frames of a codec's context for which a form is compared with its portable graph."""


def retarget(path: Path, targets: Collection[str], progress: Progress = lambda _stage, _done: None) -> Bundle:
    """Make the forms of the bundle in the folder `path` for `targets` anew, and return the bundle. Its other forms stay.

    The folder is replaced when all is done, with all files in it, also those that are not the bundle's.
    Raises ExportError for an unknown target, for a bundle without frame and target tensorrt, for a form that differs from its
    portable graph, for a folder that cannot be replaced, and for a bundle that another process changes meanwhile; BundleError for
    a folder that is no bundle, and for a file that is not the one in the manifest.
    """
    check_known("target", targets, TARGETS)
    if is_reference(path):
        raise ExportError(
            f"{path} is in the cache of the hub, where no file is changed",
            hint=f"copy it with `fishrt fetch {path.as_posix().removeprefix('hf:')} FOLDER`, and give FOLDER",
        )
    check_replaceable(path)
    data, path = _data(path), path.resolve()  # the folder may be the current one, which is replaced
    is_old = data.get("schema") == SCHEMA - 1
    bundle = Bundle(path, _upgraded(path, data)) if is_old else Bundle.load(path)
    try:
        progress("checking the files", 0.0)
        bundle.verify()  # the new manifest vouches for the same files
        with new_folder(path, replace=True) as aside:
            _make(aside, bundle, targets, SIDE_FILES if is_old else (), progress)
            if _data(path) != data:
                raise ExportError(f"another process has changed {path} meanwhile", hint="run the command again")
    except OSError as error:
        raise ExportError(f"{path} cannot be replaced: {error}", hint="check the free space and your permissions") from error
    return Bundle.load(path)


def _make(aside: Path, bundle: Bundle, targets: Collection[str], left_out: Collection[str], progress: Progress) -> None:
    """Write the bundle with the forms for `targets` into an empty folder, without the files `left_out`."""
    manifest = bundle.manifest
    kept = {role: [form for form in graph.forms if not _is_made(form, targets)] for role, graph in manifest.graphs.items()}
    if "coreml" in targets:
        check_codec(manifest.specs["codec_decode"])
    fast = manifest.graphs.get("fast_ar")
    if "tensorrt" in targets and fast is not None and fast.form("tensorrt", ()) is None:
        hint = "export the checkpoint with `fishrt export --target tensorrt`"
        raise ExportError(f"{manifest.name} has no frame graph, which TensorRT runs in place of the fast AR", hint=hint)
    forms = [form for graph in manifest.graphs.values() for form in graph.forms if _is_made(form, targets)]
    # A file that is written again must be a new one: a link would change the bundle that is read.
    stale = {file for form in forms for file in form.files} - {spec.file for spec in manifest.specs.values()}
    for entry in bundle.path.iterdir():
        if entry.is_dir():
            shutil.copytree(entry, aside / entry.name, copy_function=_link)
        elif entry.name not in (MANIFEST, *left_out) and entry.name.removesuffix(".data") not in stale:
            _link(entry, aside / entry.name)
    graphs = {}
    for n, (role, graph) in enumerate(manifest.graphs.items()):
        progress(role, n / len(manifest.graphs))
        graphs[role] = _with_forms(aside, role, replace(graph, forms=tuple(kept[role])), manifest, targets)
    files = {name: entry for name, entry in manifest.files.items() if name.removesuffix(".data") not in stale}
    written = {name for graph in graphs.values() for file in graph.files for name in (file, f"{file}.data")} - files.keys()
    files |= {name: describe_file(aside / name) for name in written if (aside / name).is_file()}
    made = replace(manifest, graphs=graphs, recipe=with_targets(manifest.recipe, targets)).sealed(dict(sorted(files.items())))
    (aside / MANIFEST).write_text(made.to_json(), encoding="utf-8")
    Bundle.load(aside)


def _data(path: Path) -> dict[str, Any]:
    """Return the decoded manifest; empty if it is none, which Bundle.load reports."""
    try:
        data = json.loads((path / MANIFEST).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _is_made(form: Form, targets: Collection[str]) -> bool:
    """Return whether make_forms or static_form makes the form again. A codec in 8 bits and a frame come from the export alone."""
    return form.provider in targets and form.provider != "tensorrt" and form.rounding is None


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(Path(source).resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _with_forms(folder: Path, role: str, graph: Graph, manifest: Manifest, targets: Collection[str]) -> Graph:
    frame, cases = graph.form("tensorrt", ()), _cases(role, manifest)
    forms = make_forms(folder, role, graph.spec, targets, frame, hop=manifest.codec.hop)
    tolerance = 1.0 if graph.parity is None else graph.parity.tolerance
    if any(form.provider == PROVIDER for form in forms):
        engine = open_engine(folder / graph.spec.file, graph.spec, provider=PROVIDER)
        expected = [(case, run(engine, case)) for case in cases]
        forms = [_compared(form, graph, folder, expected, tolerance) if form.provider == PROVIDER else form for form in forms]
    if "coreml" in targets and role == "codec_decode":
        forms.append(static_form(folder, graph.spec, cases[-1], tolerance, manifest.codec.fingerprint))
    elif "coreml" in targets and role in ("slow_ar", "fast_ar"):
        graph = replace(graph, coreml_step=step_usability(folder, graph.spec))
    return replace(graph, forms=(*graph.forms, *forms))


def _compared(form: Form, graph: Graph, folder: Path, expected: list[tuple[Case, Expected]], tolerance: float) -> Form:
    """Return the form with its errors. Raises ExportError if they are larger than allowed."""
    against = f"the graph {graph.spec.file}"
    found = compare(exact(form.spec, folder), folder, expected, tolerance, against, of_form=True)
    (folder / exact_file(form.spec)).unlink(missing_ok=True)
    before = 0.0 if graph.parity is None else graph.parity.max_abs_error
    parity = Parity(before + found.max_abs_error, tolerance, PROVIDER)
    added = compare(form.spec, folder, expected, tolerance, against).max_abs_error if form.spec.rounds_activations else None
    return replace(form, parity=parity, activations_error=added)


def _cases(role: str, manifest: Manifest) -> list[Case]:
    codec, specs = manifest.codec, manifest.specs
    if role == "codec_encode":
        return codec_encode_cases(codec, SIGHT)
    if role == "codec_decode":
        return codec_decode_cases(codec, specs[role], SIGHT)
    if isinstance(manifest.model, Diffusion):
        return diffusion_cases(role, specs[role], manifest.model.patch)
    lm = manifest.language_model
    if role == "slow_ar":
        return slow_ar_cases(lm, AudioIds(range(lm.semantic_begin_id, lm.semantic_end_id + 1), lm.end_id))
    return fast_ar_cases(lm, next(t.shape[1] for t in specs[role].feeds if t.name == "hidden"))  # type: ignore[arg-type]


def _upgraded(folder: Path, data: dict[str, Any]) -> Manifest:
    try:
        return upgraded(folder, data)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{folder} is no whole bundle of schema {SCHEMA - 1}: {error!r}", hint=AGAIN) from None


def upgraded(folder: Path, data: dict[str, Any]) -> Manifest:
    """Return the manifest of a bundle of schema 3 in this schema, without SIDE_FILES. data: its decoded `manifest.json`."""
    static, int8, quantisation = (_side(folder, name) for name in SIDE_FILES)
    steps = {step["role"]: step["usability"] for step in static["steps"]} if static else {}
    graphs = {
        role: {
            "spec": spec,
            "precision": data["precision"][role],
            "memory": data["memory"][role],
            "parity": data["parity"].get(role),
            "coreml_step": steps.get(role),
        }
        for role, spec in data["graphs"].items()
    }
    decode, forms = data["graphs"]["codec_decode"], []
    if int8:
        spec = {**decode, "file": int8.pop("file")}
        forms.append({"provider": "cpu", "spec": spec, "needs": ["vnni"], "rounding": int8})
    if static:
        forms.append({"provider": static["target"], "spec": decode, "parts": static["codec_decode"]})
    graphs["codec_decode"]["forms"] = forms
    kept = ("name", "exported_by", "codec", "tokenizer", "licence", "voices")
    new = {
        **{name: data[name] for name in kept},
        "schema": SCHEMA,
        "family": data.get("family", ""),
        "recipe": data.get("recipe", ""),
        "model": {"kind": "dual_ar", **data["language_model"]},
        "graphs": graphs,
        "quantisation": quantisation,
        "files": {name: entry for name, entry in data["files"].items() if name not in SIDE_FILES},
    }
    manifest = parse_dataclass(Manifest, new, "manifest")
    manifest = manifest.sealed(manifest.files)
    manifest.check()
    return manifest


def _side(folder: Path, name: str) -> Any:
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
