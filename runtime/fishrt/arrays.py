"""Array types of the runtime."""

from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
"""Token ids and codes."""
Floats = npt.NDArray[np.float32]
"""Logits, noise and latents."""
Sound = npt.NDArray[Any]
"""What a codec makes of sound: codes, integers [K, frames], or latents, float32 [frames, channels]."""
Pcm = npt.NDArray[np.float32]
"""Samples [samples], mono, −1..1."""
