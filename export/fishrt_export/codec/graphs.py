"""The two graphs of a DAC codec. The wrapped parts keep their names, so that initialisers are called as in the checkpoint."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from fishrt_engines.spec import GraphSpec, TensorSpec

from .dac import Dac, DacConfig


class CodecEncode(nn.Module):
    """audio [batch, 1, frames·hop] → codes [batch, codebooks, frames]."""

    def __init__(self, dac: Dac) -> None:
        super().__init__()
        self.encoder, self.quantizer = dac.encoder, dac.quantizer

    def forward(self, audio: Tensor) -> Tensor:
        """See the class."""
        return self.quantizer.encode(self.encoder(audio))


class CodecDecode(nn.Module):
    """codes [batch, codebooks, frames] → audio [batch, 1, frames·hop]."""

    def __init__(self, dac: Dac) -> None:
        super().__init__()
        self.quantizer, self.decoder = dac.quantizer, dac.decoder

    def forward(self, codes: Tensor) -> Tensor:
        """See the class."""
        return cast(Tensor, self.decoder(self.quantizer.decode(codes)))


def codec_encode_spec(config: DacConfig) -> GraphSpec:
    """The contract of codec_encode; "samples" is hop · "frames"."""
    return GraphSpec(
        file="codec_encode.onnx",
        inputs=(TensorSpec("audio", "float32", ("batch", 1, "samples")),),
        outputs=(TensorSpec("codes", "int64", ("batch", len(config.codebook_sizes), "frames")),),
    )


def codec_decode_spec(config: DacConfig) -> GraphSpec:
    """The contract of codec_decode; "samples" is hop · "frames"."""
    return GraphSpec(
        file="codec_decode.onnx",
        inputs=(TensorSpec("codes", "int64", ("batch", len(config.codebook_sizes), "frames")),),
        outputs=(TensorSpec("audio", "float32", ("batch", 1, "samples")),),
    )
