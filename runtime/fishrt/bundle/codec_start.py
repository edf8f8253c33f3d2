"""`codec_start.npz` of a bundle: the initial state of the codec's streams, for codecs that tick when they begin from zeros.

The state of a causal decoder is zeros before its first frame. Silence leaves other values, so the decoder begins with a tick
unless it was trained to begin from zeros. minnow was not: its training loss leaves out the first frames of a crop. Its tick peaks
at −28 dBFS; from the state after silence, it begins at −64 dBFS. `fishrt export` writes the file if it finds a tick.
"""

from __future__ import annotations

import numpy as np

from fishrt_engines import Array

from ..errors import BundleError
from .folder import Bundle
from .strict import AGAIN

CODEC_START = "codec_start.npz"


def read_codec_start(bundle: Bundle) -> dict[str, Array]:
    """Return initial state tensors of codec_decode, float32, batch of 1, by input name; all others begin as zeros.

    Return none if the bundle lists no such file. Raises BundleError for the file of another codec.
    """
    if CODEC_START not in bundle.manifest.files:
        return {}
    path = bundle.file(CODEC_START)
    try:
        with np.load(path, allow_pickle=False) as file:
            start: dict[str, Array] = {name: file[name] for name in file.files}
    except Exception as error:  # numpy and zipfile raise whatever a damaged file makes them raise
        raise BundleError(f"{path} cannot be read: {error}", hint=AGAIN) from None
    wanted = {t.name: (t.dtype, t.resolve({"batch": 1})) for t in bundle.manifest.specs["codec_decode"].state_tensors}
    if wrong := [name for name, array in start.items() if (array.dtype.name, array.shape) != wanted.get(name)]:
        raise BundleError(f"{path} holds {wrong[0]}, which codec_decode does not carry in this form", hint=AGAIN)
    return start
