"""Array types of the runtime."""

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
"""Token ids and codes."""
Floats = npt.NDArray[np.float32]
"""Logits and noise."""
Pcm = npt.NDArray[np.float32]
"""Samples [samples], mono, −1..1."""
