"""Export of official checkpoints as bundles. Needs torch; importing this package does not load it yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .options import Lora, Options

if TYPE_CHECKING:
    from .export import export_bundle

__all__ = ["Lora", "Options", "export_bundle"]


def __getattr__(name: str) -> object:
    if name == "export_bundle":
        from .export import export_bundle

        return export_bundle
    raise AttributeError(name)
