"""`int8_codec.json` of a bundle: its decoder of codes with convolutions in integers of 8 bits, for CPUs.

`fishrt export --codec-int8` writes it, with the graph. It is used on CPUs that multiply such integers four at a time (VNNI):
on others, ONNX Runtime's kernels are slower or lose bits.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass

from fishrt_engines.machine import cpu_features

from ..errors import BundleError
from .folder import AGAIN, Bundle, read_listed

log = logging.getLogger(__name__)

INT8_CODEC = "int8_codec.json"
NEEDED = ("avx512_vnni", "avx_vnni")
"""Instruction sets; the CPU must have one of them."""


@dataclass(frozen=True, slots=True)
class Int8Codec:
    """The 8-bit decode graph, and its measured rounding error."""

    file: str
    """File of the graph, which has the inputs and outputs of codec_decode."""
    convolutions: int
    """Number of convolutions in integers."""
    calibration_frames: int
    """Number of random frames on which the ranges of activations were measured."""
    snr_db: float
    """Mean power of the float graph's sound over that of the error, in dB, on streams of other random codes. The
    products are exact, as with VNNI, whichever CPU exports."""
    least_snr_db: float
    """The least of these ratios, in dB."""

    def summary(self) -> str:
        """Return a line of text."""
        ratio = f"{self.snr_db:.1f} dB, {self.least_snr_db:.1f} dB at least"
        return f"{self.convolutions} convolutions of the decoder in 8 bits, signal over error {ratio} (random codes)"

    def to_json(self) -> str:
        """Return the text of `int8_codec.json`."""
        return json.dumps(asdict(self), indent=1) + "\n"


def read_int8_codec(bundle: Bundle) -> Int8Codec | None:
    """Read `int8_codec.json`; return None for a bundle that does not list it. Raises BundleError for an invalid one."""
    found = read_listed(bundle, INT8_CODEC, Int8Codec)
    if found is not None and found.file not in bundle.manifest.files:
        raise BundleError(f"{bundle.file(INT8_CODEC)} names {found.file}, which the bundle does not list", hint=AGAIN)
    return found


def int8_decode(bundle: Bundle) -> str | None:
    """Return the file of the 8-bit graph if the bundle has one and this CPU has instructions for it, else None.

    Raises BundleError as `read_int8_codec`.
    """
    found = read_int8_codec(bundle)
    if found is None:
        return None
    if not set(NEEDED) & set(cpu_features()):
        log.info("the codec runs in float: this CPU has neither %s", " nor ".join(NEEDED))
        return None
    return found.file
