"""Turns official checkpoints into bundles. Needs torch, which is loaded when something is exported, not before."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .bundle import export_bundle
    from .lora import Lora
    from .memory import peak_memory

__all__ = ["Lora", "export_bundle", "peak_memory"]


def __getattr__(name: str) -> object:
    if name == "export_bundle":
        from .bundle import export_bundle

        return export_bundle
    if name == "Lora":
        from .lora import Lora

        return Lora
    if name == "peak_memory":
        from .memory import peak_memory

        return peak_memory
    raise AttributeError(name)
