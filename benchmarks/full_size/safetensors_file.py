"""Writing of a safetensors file piece by piece: the length of a JSON header in 8 bytes, the header, the tensors' bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BYTES = 2
"""Size of a bfloat16."""


def write_bfloat16(path: Path, shapes: Mapping[str, tuple[int, ...]], pieces: Callable[[str], Iterable[Tensor]]) -> None:
    """Write bfloat16 tensors. pieces: returns the rows of a tensor by its name, in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + BYTES * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in shapes:
            for piece in pieces(name):
                file.write(piece.view(torch.uint8).numpy().data)
