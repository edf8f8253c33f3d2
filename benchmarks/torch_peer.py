"""The exporter's own torch modules, eager, behind the interface of an engine: the peer that fishrt is measured against.

They run in the same loop, with the same prompts, sampling and number of calls. The key/value cache is a fair one: columns are
written in place, and attention reads the rows that are written, without a mask or copies of the keys for each query head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fishrt.bench.timed import TimedEngine
from fishrt_engines import Array, GraphSpec, State
from fishrt_export import transformer
from fishrt_export.codec.source import open_codec
from fishrt_export.fast_ar import FastAR, fast_ar_spec
from fishrt_export.graphs import open_language_model
from fishrt_export.slow_ar import SlowAR, slow_ar_spec
from fishrt_export.transformer import Stack

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def open_torch(checkpoint: Path, dtype: torch.dtype) -> dict[str, TimedEngine]:
    """slow_ar with the audio head, and fast_ar, in `dtype`. Weights that have it already are not copied."""
    source = open_language_model(checkpoint, codec=open_codec(checkpoint).kind)
    with torch.device("meta"):
        slow, fast = SlowAR(source.config, source.ids.semantic, len(source.audio_head)), FastAR(source.config)
    _fill(slow, source.slow_weights("audio"), dtype)
    _fill(fast, source.fast_weights(), dtype)
    specs = slow_ar_spec(source.config, len(source.audio_head)), fast_ar_spec(source.config)
    return {
        "slow_ar": TimedEngine(_TorchEngine(slow, specs[0], dtype)),
        "fast_ar": TimedEngine(_TorchEngine(fast, specs[1], dtype)),
    }


def open_torch_decoder(checkpoint: Path, dtype: torch.dtype) -> Callable[[Array], Array]:
    """codes int64 [codebooks, frames] → pcm [samples], in one call."""
    codec = open_codec(checkpoint).module().to(dtype)
    for part in codec.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_pre_hook(lambda linear, inputs: (inputs[0].to(linear.weight.dtype),))  # FSQ's are float32

    def decode(codes: Array) -> Array:
        with torch.inference_mode():
            return codec.decode(torch.from_numpy(codes)[None])[0, 0].float().numpy()

    return decode


def _fill(module: Stack, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    module.load_state_dict({name: weights[name].to(dtype) for name in module.state_dict()}, assign=True)
    module.requires_grad_(False).eval()
    # A plain list: the modules take slices of their layers, which costs time with one that keeps account of parameters.
    layers = list(module.layers)
    del module.layers
    module.layers = layers


class _TorchState:
    """Caches. See `fishrt_engines.State`."""

    def __init__(self, spec: GraphSpec, dims: Mapping[str, int], dtype: torch.dtype) -> None:
        self.spec, self.dims = spec, dict(dims)
        self.caches = [torch.zeros(t.resolve(dims), dtype=dtype) for t in spec.state_tensors]

    def read(self, name: str) -> Array:
        return self._named(name).float().numpy()

    def write(self, name: str, array: Array) -> None:
        self._named(name)[tuple(map(slice, array.shape))] = torch.from_numpy(array)

    def grow(self, **dims: int) -> None:
        self.dims |= dims
        larger = _TorchState(self.spec, self.dims, self.caches[0].dtype).caches
        for new, old in zip(larger, self.caches, strict=True):
            new[tuple(map(slice, old.shape))] = old
        self.caches = larger

    def _named(self, name: str) -> Tensor:
        return self.caches[[t.name for t in self.spec.state_tensors].index(name)]


class _TorchEngine:
    """One module, for a batch of one. See `fishrt_engines.Engine`."""

    provider = "cpu"

    def __init__(self, module: nn.Module, spec: GraphSpec, dtype: torch.dtype) -> None:
        self.module, self.spec, self._dtype = module, spec, dtype

    def new_state(self, **dims: int) -> _TorchState:
        return _TorchState(self.spec, dims, self._dtype)

    def run(self, feeds: Mapping[str, Array], state: State | None = None) -> dict[str, Array]:
        assert isinstance(state, _TorchState)
        tensors = [torch.from_numpy(feeds[t.name]) for t in self.spec.feeds]
        floats = [t.to(self._dtype) if t.is_floating_point() else t for t in tensors]
        with torch.inference_mode(), _in_place():
            outputs = self.module(*floats, state.caches)
        return {t.name: value.float().numpy() for t, value in zip(self.spec.results, outputs, strict=False)}


@contextmanager
def _in_place() -> Iterator[None]:
    """The caches of the blocks written in place and read as far as they are written."""
    with mock.patch.object(transformer, "scatter", _scatter), mock.patch.object(transformer, "attend", _attend):
        yield


def _scatter(cache: Tensor, new: Tensor, write_index: Tensor) -> Tensor:
    """The rows of a cache [1, heads, rows, head_dim] up to the last of `new`, which were written into it."""
    start, length = int(write_index[0]), new.shape[2]
    cache[:, :, start : start + length] = new
    return cache[:, :, : start + length]


def _attend(q: Tensor, keys: Tensor, values: Tensor, _mask: Tensor) -> Tensor:
    """A single column sees all rows, so that the query heads of a group can stand as its positions; several see those before."""
    length, heads = q.shape[2], q.shape[1]
    if length == 1:
        grouped = q.reshape(1, keys.shape[1], -1, q.shape[3])
        return F.scaled_dot_product_attention(grouped, keys, values).reshape(1, heads, 1, -1)
    assert length == keys.shape[2], "several columns at once are a prefill"
    return F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
