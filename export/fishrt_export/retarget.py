"""Bundles of schema 3 as bundles of this schema: side files become parts of the manifest. No graph is changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fishrt.bundle.folder import describe_files
from fishrt.bundle.manifest import SCHEMA, Manifest
from fishrt.bundle.strict import parse_dataclass

SIDE_FILES = ("static.json", "int8_codec.json", "quantisation.json")
"""Files of a bundle of schema 3 whose content is in the manifest now."""


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
        "files": {},
    }
    files = {name: entry for name, entry in describe_files(folder).items() if name not in SIDE_FILES}
    manifest = parse_dataclass(Manifest, new, "manifest").sealed(files)
    manifest.check()
    return manifest


def _side(folder: Path, name: str) -> Any:
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
