"""The only place for tolerances. Each is the largest absolute difference allowed, with the measurement behind it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Arrays = Mapping[str, npt.NDArray[np.generic]]

TOLERANCES = {
    # Probabilities after the filters. The vectors' own suggestion; measured: 3e-8 where the same entries are kept.
    "probs": 1e-6,
    # Distance of an entry's cumulative probability from top_p within which rounding decides whether it is kept. Measured: torch's
    # float32 softmax of 200 logits adds up to 1 + 1.8e-7, so that top_p = 1 removes the last entry there (sampler/2, p = 9e-7).
    "cumulative": 5e-7,
    # Logits, hidden vectors and caches of slow and fast AR. The vectors' own suggestion; measured: 3e-5 on logits of up to 45.
    "lm": 5e-4,
    # Weights with a LoRA merged into them in float32. Measured: 0.
    "merged": 1e-6,
    # One unit in the last place of a bfloat16 near 1. The originals' tables come from float32 angles, so a rare entry is rounded
    # the other way (12 of 37,888 in one of their files); measured here: none.
    "rope": 2**-8,
    # Our float32 modules and graphs against a float64 numpy model of 2 layers. Measured: 3.4e-6.
    "reference": 2e-5,
    # Audio of the same frames in sequences or batches of other sizes: other kernels, other orders of summation. Measured: 1e-6.
    "prefix": 1e-5,
    # Latents of a diffusion model after all Euler steps, from the same noise. Guidance amplifies rounding. The vectors' own
    # suggestion; measured: 6.6e-5 with a denoiser in float64. Velocities rescaled at t = 0.999, where the original takes the
    # difference of two large numbers: 2.6e-4.
    "trajectory": 1e-3,
    # The log-mel spectrogram, where the vectors' own tolerance is less. Measured: up to 4e-5 in quiet bands between float64 and
    # the originals, whose filters and windows are rounded otherwise.
    "log-mel": 4e-5,
    # Filters of the mel scale, up to 0.04, computed in float64 here and in float32 by the originals. Measured: 1.8e-7.
    "mel filters": 5e-7,
    # Resampled audio, beyond the bound on how the originals round times (see test_parity_codec.py): products and sums in float32.
    # Measured: 2e-7 against a kernel with the originals' times; 7e-6 of that bound's 1.9e-5 with ours, at 16 kHz.
    "resampled": 1e-6,
    # Codes decoded piece by piece, with a state or with the frames around them, against all at once. Measured: 1.5e-6 with a
    # state, of 66 chunkings of two random inputs for each family. Both are 2e-6 to 3e-6 from what float64 gives.
    "stream": 3e-6,
    # Graphs lowered for TensorRT against the portable ones, in ONNX Runtime, in proportion to the largest number of a result.
    # Measured: 0 for whole graphs, 2.4e-7 for single operators.
    "lowered": 1e-6,
    # The same in float16, which ONNX Runtime emulates on a CPU. Measured: 3.4e-3 at worst, of 8 graphs with random weights in 4
    # forms each.
    "lowered to float16": 6e-3,
    # Of graphs of 2 layers computed in float16, as a share of the largest value. Measured: 4.7e-4.
    "float16": 2e-3,
    # On a CUDA device, in bfloat16 or with TF32, as a share of the largest value. Not measured on a device.
    "on a device": 5e-2,
    # Audio and state of static graphs, in primitive operators, against the portable graph, both on the CPU with random codes.
    # Measured: 1.04e-5, in a state of a DAC.
    "static": 2e-5,
    # Logits and caches of steps of the language model made in the same way. Measured: 1.9e-5 on logits of up to 51.
    "static step": 5e-5,
}


def assert_near(found: Arrays, expected: Arrays) -> None:
    """Check that two sets of results of slow or fast AR have the same names, shapes and, within "lm", values."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        np.testing.assert_allclose(found[name], value, rtol=0, atol=TOLERANCES["lm"], equal_nan=False, err_msg=name)
