"""`codec_start.npz` of a bundle: the state in which a stream of its codec begins, where zeros are not good enough.

A causal decoder fills up with zeros before its first frame. Silence leaves other numbers in its layers, so that a decoder begins
with a tick unless it learned to begin from zeros. minnow did not: its training does not judge the first frames of a crop. Its
tick peaks at −28 dBFS; from the state that silence leaves, it begins at −64 dBFS. `fishrt export` writes the file where it finds
a tick.
"""

from __future__ import annotations

import zipfile

import numpy as np

from fishrt_engines import Array

from .bundle import AGAIN, Bundle
from .errors import BundleError

CODEC_START = "codec_start.npz"


def read_codec_start(bundle: Bundle) -> dict[str, Array]:
    """Return state tensors of codec_decode at the start of a stream, float32, batch of 1, by input name.

    Those that it lacks begin as zeros. Empty where the bundle lists no such file. Raises BundleError for one of another codec.
    """
    if CODEC_START not in bundle.manifest.files:
        return {}
    path = bundle.file(CODEC_START)
    try:
        with np.load(path, allow_pickle=False) as file:
            start: dict[str, Array] = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path} cannot be read: {error}", hint=AGAIN) from None
    wanted = {t.name: (t.dtype, t.resolve({"batch": 1})) for t in bundle.manifest.graphs["codec_decode"].state_tensors}
    if wrong := [name for name, array in start.items() if (array.dtype.name, array.shape) != wanted.get(name)]:
        raise BundleError(f"{path} holds {wrong[0]}, which codec_decode does not carry in this form", hint=AGAIN)
    return start
