"""Tensors that are read or computed when they are looked up, so that a checkpoint need not fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

Maker = Callable[[], Tensor]


class Lazy(Mapping[str, Tensor]):
    """Named tensors, each made anew at every lookup. Nothing is cached, so look each up once and drop it after use."""

    def __init__(self, makers: Mapping[str, Maker]) -> None:
        self._makers = dict(makers)

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def makers(tensors: Mapping[str, Tensor]) -> dict[str, Maker]:
    """Return a function for each tensor that looks it up. Renaming or dropping the functions reads no tensor."""
    return {name: _looking_up(tensors, name) for name in tensors}


def _looking_up(tensors: Mapping[str, Tensor], name: str) -> Maker:
    return lambda: tensors[name]
