"""The forms of a codec that are traced: encoding or decoding as `forward`, with the state of a causal decoder in and out.

The decode graph of a causal codec takes the next frames of a stream and the state after the frames before them; a state of zeros
is the start. It decodes a whole sequence in one call or in any chunks, with the same result.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fishrt_engines.engine import GraphSpec, StatePair, TensorSpec

from .carry import Carry
from .dac import Dac
from .firefly import Firefly
from .latent_dac import LatentDac

COLUMNS = "columns."
"""Prefix of the state tensors of convolutions; those of attention are key and value caches."""

# A graph has only the weights of its own direction: the exporter drops unused ones.


def encoding(codec: Dac | Firefly) -> nn.Module:
    """Return the codec with `encode` as `forward`: audio in, codes or latents out."""
    codec.forward = codec.encode
    return codec


def decoding(codec: Dac | Firefly) -> nn.Module:
    """Return the codec with a `forward` that takes the inputs of `decode_spec` in their order, the state as one list."""

    def at_positions(codes: Tensor, position_ids: Tensor, state: list[Tensor]) -> tuple[Tensor, ...]:
        carry = Carry(state, position_ids)
        return codec.decode(codes, carry), *carry.after

    def without_positions(codes: Tensor, state: list[Tensor]) -> tuple[Tensor, ...]:
        carry = Carry(state)
        return codec.decode(codes, carry), *carry.after

    if isinstance(codec, Dac):
        codec.forward = at_positions
    else:
        codec.forward = without_positions if codec.config.causal else codec.decode
    return codec


def decode_spec(empty: Dac | Firefly) -> GraphSpec:
    """Return the inputs, outputs and states of the decode graph, and move the whole codec to the meta device."""
    inputs = [coded_spec(empty)]
    if isinstance(empty, Dac):
        inputs.append(TensorSpec("position_ids", "int64", ("batch", "frames")))
    state = _state_tensors(empty)
    return GraphSpec(
        file="codec_decode.onnx",
        inputs=(*inputs, *state),
        outputs=(TensorSpec("audio", "float32", ("batch", 1, "samples")), *(_output(tensor) for tensor in state)),
        states=tuple(StatePair(tensor.name, _output(tensor).name) for tensor in state),
    )


def coded_spec(codec: Dac | Firefly) -> TensorSpec:
    """Return what audio becomes: codes, or latents."""
    if isinstance(codec, LatentDac):
        return TensorSpec("latents", "float32", ("batch", "frames", codec.channels))
    return TensorSpec("codes", "int64", ("batch", len(codec.config.codebook_sizes), "frames"))


def _output(state: TensorSpec) -> TensorSpec:
    kind, number = state.name.split(".")
    return TensorSpec(f"{kind}_out.{number}", state.dtype, state.shape)


def _state_tensors(empty: Dac | Firefly) -> list[TensorSpec]:
    """Return the state tensors that the layers use when one frame is decoded, numbered within each kind."""
    if isinstance(empty, Firefly) and not empty.config.causal:
        return []
    coded, one = coded_spec(empty), {"batch": 1, "frames": 1}
    carry = Carry(None, torch.zeros(1, 1, dtype=torch.int64, device="meta"))
    empty.to("meta").decode(torch.zeros(coded.resolve(one), dtype=getattr(torch, coded.dtype), device="meta"), carry)
    tensors, counts = [], dict.fromkeys(carry.kinds, 0)
    for kind, tensor in zip(carry.kinds, carry.after, strict=True):
        tensors.append(TensorSpec(f"{kind}.{counts[kind]}", "float32", ("batch", *tensor.shape[1:])))
        counts[kind] += 1
    return tensors
