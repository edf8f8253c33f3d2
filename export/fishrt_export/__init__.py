"""Export of official checkpoints as bundles. Needs torch; importing this package does not load it yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint.lora import Lora
    from .export import check_out, export_bundle

__all__ = ["Lora", "check_out", "export_bundle"]


def __getattr__(name: str) -> object:
    if name == "export_bundle":
        from .export import export_bundle

        return export_bundle
    if name == "check_out":
        from .export import check_out

        return check_out
    if name == "Lora":
        from .checkpoint.lora import Lora

        return Lora
    raise AttributeError(name)
