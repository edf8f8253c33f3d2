"""The exporter's torch modules behind the interface of an engine: the peer of the benchmarks.

They run in the same loop, with the same prompts, sampling and number of calls. The KV cache is efficient: columns are written in
place, and attention reads only written rows, without a mask and without copies of the keys for each query head.

On a device, the peer draws a whole column there, as fishrt does, by `models.frame`, eager or compiled. Compiled means Inductor's
kernels in a CUDA graph (mode "reduce-overhead"), one for a step of the slow AR and one for all positions of the fast AR, as in
fishrt. Modes with autotuning compile for many minutes; without a CUDA graph, launches would dominate the time. A compiled step
has fixed shapes, so its attention reads the whole cache under a mask. Prefills are eager.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fishrt.bench.setup import TimedEngine
from fishrt.bundle.features import LanguageModel
from fishrt.language_model.drawing import frame_spec
from fishrt_engines import Array, GraphSpec, State
from fishrt_engines.engine import OneRow, Traits
from fishrt_export.models import transformer
from fishrt_export.models.fast_ar import FastAR, fast_ar_spec
from fishrt_export.models.frame import Frame
from fishrt_export.models.slow_ar import SlowAR, slow_ar_spec
from fishrt_export.models.transformer import Transformer
from fishrt_export.sources.codec import open_codec
from fishrt_export.sources.language_model import open_language_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COMPILED = {"mode": "reduce-overhead"}
"""Arguments of torch.compile for a device's peer."""


@dataclass(frozen=True, slots=True)
class TorchModel:
    """A language model with the audio head, on one device, in one dtype."""

    slow: SlowAR
    fast: FastAR
    slow_spec: GraphSpec
    fast_spec: GraphSpec


def load_torch(checkpoint: Path, dtype: torch.dtype, device: str = "cpu") -> TorchModel:
    """Load a checkpoint. Weights that already have the dtype and are on the device are not copied."""
    source = open_language_model(checkpoint, codec=open_codec(checkpoint).kind)
    head = len(source.audio_head)
    with torch.device("meta"):
        slow, fast = SlowAR(source.config, source.ids.semantic, head), FastAR(source.config)
    _fill(slow, source.slow_weights("audio"), dtype, device)
    _fill(fast, source.fast_weights(), dtype, device)
    return TorchModel(slow, fast, slow_ar_spec(source.config, head), fast_ar_spec(source.config))


def open_torch(checkpoint: Path, dtype: torch.dtype, device: str = "cpu") -> dict[str, TimedEngine]:
    """Return slow_ar, called once for a column, and fast_ar, called once for a code. Both are eager."""
    model = load_torch(checkpoint, dtype, device)
    return {
        "slow_ar": TimedEngine(_TorchEngine(model.slow, model.slow_spec)),
        "fast_ar": TimedEngine(_TorchEngine(model.fast, model.fast_spec)),
    }


def open_torch_frames(model: TorchModel, lm: LanguageModel, compiled: Mapping[str, Any] | None = None) -> dict[str, TimedEngine]:
    """Return slow_ar, and as fast_ar a `Frame`, which draws a whole column. compiled: arguments of torch.compile, if any."""
    spec = frame_spec(model.slow_spec, model.fast_spec, lm)
    frame = _FrameEngine(_InPlaceFrame(model.fast, lm, spec), spec, compiled)
    slow = _TorchEngine(model.slow, model.slow_spec) if compiled is None else _CompiledEngine(model, compiled)
    return {"slow_ar": TimedEngine(slow), "fast_ar": TimedEngine(frame)}


def open_torch_decoder(checkpoint: Path, dtype: torch.dtype, device: str = "cpu") -> Callable[[Array], Array]:
    """Return a function from codes int64 [codebooks, frames] to pcm [samples]."""
    codec = open_codec(checkpoint).module().to(device, dtype)
    for part in codec.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_pre_hook(lambda linear, inputs: (inputs[0].to(linear.weight.dtype),))  # FSQ's are float32

    def decode(codes: Array) -> Array:
        with torch.inference_mode():
            return codec.decode(torch.from_numpy(codes)[None].to(device))[0, 0].float().cpu().numpy()

    return decode


def _fill(module: Transformer, weights: Mapping[str, Tensor], dtype: torch.dtype, device: str) -> None:
    module.load_state_dict({name: weights[name].to(device, dtype) for name in module.state_dict()}, assign=True)
    module.requires_grad_(False).eval()
    module.cos, module.sin = module.cos.to(device), module.sin.to(device)
    # A plain list: the modules slice their layers, which is slow for a ModuleList.
    layers = list(module.layers)
    del module.layers
    module.layers = layers


@dataclass(frozen=True, slots=True)
class TorchResident:
    """A result on the device. See `fishrt_engines.engine.Resident`."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(str(self.tensor.dtype).removeprefix("torch."))

    def numpy(self) -> Array:
        return self.tensor.cpu().numpy()


class _TorchState(OneRow):
    """KV caches. See `fishrt_engines.State`."""

    def __init__(self, owner: _TorchEngine, dims: Mapping[str, int]) -> None:
        self.owner, self.dims = owner, dict(dims)
        self.caches = owner.zeros(self.dims)

    def read(self, name: str) -> Array:
        return self._named(name).float().cpu().numpy()

    def write(self, name: str, array: Array) -> None:
        cache = self._named(name)
        cache[tuple(map(slice, array.shape))] = torch.from_numpy(array).to(cache)

    def grow(self, **dims: int) -> None:
        self.dims |= dims
        larger = self.owner.zeros(self.dims)
        for new, old in zip(larger, self.caches, strict=True):
            new[tuple(map(slice, old.shape))] = old
        self.caches = larger

    def _named(self, name: str) -> Tensor:
        return self.caches[[t.name for t in self.owner.spec.state_tensors].index(name)]


class _TorchEngine:
    """One module, eager, for a batch of one. See `fishrt_engines.Engine`.

    As usual in torch, a call does not wait for resident results.
    """

    def __init__(self, module: Transformer, spec: GraphSpec) -> None:
        self.module, self.spec = module, spec
        weight = next(iter(module.state_dict().values()))
        self.dtype, self.device = weight.dtype, weight.device
        self.provider, self.traits = f"torch on {self.device.type}", Traits(parts_states=False)

    def new_state(self, **dims: int) -> _TorchState:
        return _TorchState(self, dims)

    def zeros(self, dims: Mapping[str, int]) -> list[Tensor]:
        """Return caches of zeros of these sizes."""
        return [torch.zeros(t.resolve(dims), dtype=self.dtype, device=self.device) for t in self.spec.state_tensors]

    def run(self, feeds: Mapping[str, Any], state: State | None = None, resident: Collection[str] = ()) -> dict[str, Any]:
        assert isinstance(state, _TorchState)
        with torch.inference_mode():
            outputs = self.outputs(feeds, state.caches)
            return _results(self.spec, [value.float() for value in outputs[: len(self.spec.results)]], resident)

    def outputs(self, feeds: Mapping[str, Any], caches: list[Tensor]) -> tuple[Tensor, ...]:
        """Run the module, which writes into the caches. Return its outputs."""
        fed = [int(feeds[t.name][0]) if t.name == "write_index" else self.put(feeds[t.name]) for t in self.spec.feeds]
        with _in_place():
            return self.module(*fed, caches)

    def put(self, value: Any) -> Tensor:
        """Return a feed on the device, floats in the module's dtype."""
        tensor = _tensor(value, self.device)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


class _CompiledEngine(_TorchEngine):
    """The slow AR with a compiled step. There can be one state of each size at a time, since its addresses are captured."""

    def __init__(self, model: TorchModel, options: Mapping[str, Any]) -> None:
        super().__init__(model.slow, model.slow_spec)
        self._kept: dict[tuple[tuple[str, int], ...], list[Tensor]] = {}
        _stay(_tensors(model.slow))
        module, results = self.module, len(self.spec.results)

        def step(*arguments: Any) -> list[Tensor]:
            return [value.float() for value in module(*arguments)[:results]]

        self._step = torch.compile(step, fullgraph=True, dynamic=False, **options)

    def zeros(self, dims: Mapping[str, int]) -> list[Tensor]:
        """Return caches of zeros of these sizes, at the same addresses in every call."""
        key = tuple(sorted(dims.items()))
        if key not in self._kept:
            self._kept[key] = super().zeros(dims)
            _stay(self._kept[key])
        for cache in self._kept[key]:
            cache.zero_()
        return self._kept[key]

    def outputs(self, feeds: Mapping[str, Any], caches: list[Tensor]) -> tuple[Tensor, ...]:
        if feeds["prompt"].shape[2] > 1:
            return super().outputs(feeds, caches)
        torch.compiler.cudagraph_mark_step_begin()
        with _whole_cache():
            return self._step(*(self.put(feeds[t.name]) for t in self.spec.feeds), caches)


class _InPlaceFrame(Frame):
    """A frame whose caches are written in place, so that each call of the blocks is given the whole ones."""

    def _run_layers(self, x: Tensor, start: int, caches: list[Tensor]) -> Tensor:
        return super()._run_layers(x, start, list(caches))


class _FrameEngine:
    """`Frame` as an engine of `frame_spec`."""

    def __init__(self, frame: Frame, spec: GraphSpec, compiled: Mapping[str, Any] | None) -> None:
        self.spec = spec
        self._device = frame.ids.device
        self.provider, self.traits = f"torch on {self._device.type}", Traits(parts_states=False)
        self._draw: Callable[..., Tensor] = frame
        if compiled is not None:
            _stay([*_tensors(frame.fast), frame.ids])
            self._draw = torch.compile(frame, fullgraph=True, dynamic=False, **compiled)

    def new_state(self, **_dims: int) -> State:
        raise ValueError("a frame carries no state")

    def run(self, feeds: Mapping[str, Any], _state: State | None = None, resident: Collection[str] = ()) -> dict[str, Any]:
        with torch.inference_mode(), _in_place():
            column = self._draw(*(_tensor(feeds[t.name], self._device) for t in self.spec.feeds))
            return _results(self.spec, [column], resident)


def _results(spec: GraphSpec, values: list[Tensor], resident: Collection[str]) -> dict[str, Any]:
    names = [t.name for t in spec.results]
    return {
        name: TorchResident(value) if name in resident else value.cpu().numpy() for name, value in zip(names, values, strict=True)
    }


def _tensor(value: Any, device: torch.device) -> Tensor:
    return value.tensor if isinstance(value, TorchResident) else torch.tensor(value, device=device)


def _tensors(module: Transformer) -> list[Tensor]:
    """Return all parameters and buffers of a module."""
    parts = [module, *module.layers]
    return [module.cos, module.sin, *(tensor for part in parts for tensor in part.state_dict().values())]


def _stay(tensors: list[Tensor]) -> None:
    """Mark tensors as static for the compiler, which then neither copies them for a CUDA graph nor refuses to capture."""
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor)


@contextmanager
def _in_place() -> Iterator[None]:
    """Write the caches of blocks in place, and read only written rows."""
    with mock.patch.object(transformer, "scatter", _scatter), mock.patch.object(transformer, "attend", _attend):
        yield


@contextmanager
def _whole_cache() -> Iterator[None]:
    """Run single columns at a position that only the device knows."""
    with mock.patch.object(transformer, "scatter", _scatter_one), mock.patch.object(transformer, "attend", _attend_masked):
        yield


def _scatter(cache: Tensor, new: Tensor, start: int) -> Tensor:
    """Write `new` into a cache [1, heads, rows, head_dim] from row `start` on. Return the rows up to its last one."""
    end = start + new.shape[2]
    cache[:, :, start:end] = new
    return cache[:, :, :end]


def _scatter_one(cache: Tensor, new: Tensor, write_index: Tensor) -> Tensor:
    """Write `new` [1, heads, 1, head_dim] into the cache, and return the cache."""
    cache[:, :, write_index] = new
    return cache


def _attend(q: Tensor, keys: Tensor, values: Tensor, _mask: Tensor) -> Tensor:
    """Attend causally. A single column sees all rows, so the query heads of a group can be passed as its positions."""
    length = q.shape[2]
    if length == 1:
        return _ungrouped(F.scaled_dot_product_attention(_grouped(q, keys), keys, values))
    assert length == keys.shape[2], "several columns at once are a prefill"
    return F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)


def _attend_masked(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    return _ungrouped(F.scaled_dot_product_attention(_grouped(q, keys), keys, values, attn_mask=mask))


def _grouped(q: Tensor, keys: Tensor) -> Tensor:
    return q.reshape(1, keys.shape[1], -1, q.shape[3])


def _ungrouped(y: Tensor) -> Tensor:
    return y.reshape(1, -1, 1, y.shape[3])
