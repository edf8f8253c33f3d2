"""A reference of the diffusion model in plain numpy and float64, by the roles of the graphs, and engines that run it.

It is written from the rules of the model, not from fishrt's modules. All sizes come from the shapes of the weights.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fishrt.bundle.diffusion import Diffusion
from fishrt_engines.engine import GraphSpec, Traits, check_feeds
from helpers_diffusion import diffusion_model, diffusion_specs

Weights = Mapping[str, np.ndarray]
EPS = 1e-5
BASE = 10000.0


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file of float32 and bfloat16 as float64."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        if entry["dtype"] == "BF16":
            array = (np.frombuffer(data[begin:end], "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            assert entry["dtype"] == "F32"
            array = np.frombuffer(data[begin:end], "<f4")
        found[name] = array.reshape(entry["shape"]).astype(np.float64)
    return found


def random_weights(seed: int = 0, *, blockwise: bool = True) -> dict[str, np.ndarray]:
    """Return the weights of a small model, of the sizes of `helpers_diffusion.diffusion_model`."""
    noise = np.random.default_rng(seed)
    channels, patch, width, layers, heads, inner, narrow, rank = 8, 4, 12, 2, 2, 20, 8, 3
    encoders = ("text", "speaker", "latent") if blockwise else ("text", "speaker")
    sizes: dict[str, tuple[int, ...]] = {
        "text_encoder.text_embedding": (256, narrow),
        "cond_module.0": (width, 16),
        "cond_module.2": (width, width),
        "cond_module.4": (3 * width, width),
        "in_proj": (width, channels),
        "out_proj": (channels, width),
    }
    ones: dict[str, tuple[int, ...]] = {"out_norm": (width,)}
    biases = {"in_proj": width, "out_proj": channels}
    for of in encoders:
        ones[f"{of}_norm"] = (narrow,)
        if of != "text":
            sizes[f"{of}_encoder.in_proj"], biases[f"{of}_encoder.in_proj"] = (narrow, patch * channels), narrow
        name = f"{of}_encoder.blocks.0"
        sizes |= {f"{name}.attention.{part}": (narrow, narrow) for part in ("wq", "wk", "wv", "wo", "gate")}
        sizes |= {f"{name}.mlp.w1": (inner, narrow), f"{name}.mlp.w3": (inner, narrow), f"{name}.mlp.w2": (narrow, inner)}
        ones |= {f"{name}.attention.{part}": (2, narrow // 2) for part in ("q_norm", "k_norm")}
        ones |= {f"{name}.{part}": (narrow,) for part in ("attention_norm", "mlp_norm")}
    for layer in range(layers):
        name = f"blocks.{layer}"
        sizes |= {f"{name}.attention.{part}": (width, width) for part in ("wq", "wk", "wv", "wo", "gate")}
        sizes |= {f"{name}.attention.w{part}_{of}": (width, narrow) for part in "kv" for of in encoders}
        sizes |= {f"{name}.mlp.w1": (inner, width), f"{name}.mlp.w3": (inner, width), f"{name}.mlp.w2": (width, inner)}
        ones |= {f"{name}.attention.{part}": (heads, width // heads) for part in ("q_norm", "k_norm")}
        for part in (f"{name}.{norm}_adaln.{kind}" for norm in ("attention", "mlp") for kind in ("shift", "scale", "gate")):
            sizes[f"{part}_down"], sizes[f"{part}_up"], biases[f"{part}_up"] = (rank, width), (width, rank), width
    found = {f"{name}.weight": noise.normal(0, size[-1] ** -0.5, size) for name, size in sizes.items()}
    found |= {f"{name}.weight": noise.uniform(0.5, 1.5, size) for name, size in ones.items()}
    return found | {f"{name}.bias": noise.normal(0, 0.1, size) for name, size in biases.items()}


class ReferenceDiT:
    """The graphs of one checkpoint as functions of their feeds."""

    def __init__(self, weights: Weights) -> None:
        self.w = weights
        self.heads, self.head_dim = weights["blocks.0.attention.q_norm.weight"].shape
        self.layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        self.width, self.channels = weights["in_proj.weight"].shape
        self.patch = weights["speaker_encoder.in_proj.weight"].shape[1] // self.channels
        self.blockwise = "latent_encoder.in_proj.weight" in weights

    def model(self, **changes: Any) -> Diffusion:
        """Return the part of a manifest for these sizes."""
        sizes = {name: getattr(self, name) for name in ("channels", "patch", "width", "layers", "heads", "head_dim", "blockwise")}
        return diffusion_model(**{**sizes, **changes})

    def text_cond(self, tokens: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
        x = self.w["text_encoder.text_embedding.weight"][tokens]
        x = self.encoded("text", x, mask[:, None, None, :])
        return self.keys_values("text", x)

    def speaker_cond(self, latents: np.ndarray) -> dict[str, np.ndarray]:
        return self.keys_values("speaker", self.patches("speaker", latents))

    def latent_cond(self, latents: np.ndarray) -> dict[str, np.ndarray]:
        found = self.keys_values("latent", self.patches("latent", latents))
        positions = self.patch * np.arange(found["latent_keys"].shape[3])
        return {**found, "latent_keys": self.half_rotated(found["latent_keys"], positions)}

    def schedule(self, t: np.ndarray) -> dict[str, np.ndarray]:
        width = self.w["cond_module.0.weight"].shape[1]
        frequencies = 1000.0 * BASE ** (-np.arange(width // 2) / (width // 2))
        angles = t.astype(np.float64)[:, None] * frequencies
        x = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        x = silu(x @ self.w["cond_module.0.weight"].T)
        x = silu(x @ self.w["cond_module.2.weight"].T)
        parts = np.split(x @ self.w["cond_module.4.weight"].T, 3, axis=-1)
        rows = []
        for layer in range(self.layers):
            for norm in ("attention_adaln", "mlp_adaln"):
                for part, kind in zip(parts, ("shift", "scale", "gate"), strict=True):
                    name = f"blocks.{layer}.{norm}.{kind}"
                    down = silu(part) @ self.w[f"{name}_down.weight"].T
                    m = down @ self.w[f"{name}_up.weight"].T + self.w[f"{name}_up.bias"] + part
                    rows.append(np.tanh(m) if kind == "gate" else m)
        return {"modulation": np.stack(rows, axis=1).reshape(len(t), self.layers, 6, self.width)}

    def denoise(
        self,
        latents: np.ndarray,
        modulation: np.ndarray,
        position_ids: np.ndarray,
        text_keys: np.ndarray,
        text_values: np.ndarray,
        text_mask: np.ndarray,
        speaker_keys: np.ndarray,
        speaker_values: np.ndarray,
        speaker_mask: np.ndarray,
        speaker_scale: np.ndarray,
        latent_keys: np.ndarray | None = None,
        latent_values: np.ndarray | None = None,
        latent_mask: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        batch, frames, _ = latents.shape
        rows = text_mask.shape[1]
        velocity = np.empty((batch, rows, frames, self.channels))
        for b in range(batch):
            for row in range(rows):
                x = self.linear("in_proj", latents[b].astype(np.float64))
                for layer in range(self.layers):
                    given = [
                        (text_keys[b, layer], text_values[b, layer], text_mask[b, row], 1.0),
                        (speaker_keys[b, layer], speaker_values[b, layer], speaker_mask[b, row], speaker_scale[b, layer]),
                    ]
                    if latent_keys is not None:
                        given.append((latent_keys[b, layer], latent_values[b, layer], latent_mask[b], 1.0))
                    x = self.block(layer, x, modulation[b, layer], position_ids[b], given)
                velocity[b, row] = self.linear("out_proj", rms(x) * self.w["out_norm.weight"])
        return {"velocity": velocity}

    def block(self, layer: int, x: np.ndarray, m: np.ndarray, positions: np.ndarray, given: list[Any]) -> np.ndarray:
        name = f"blocks.{layer}.attention"
        y = rms(x) * (1 + m[1]) + m[0]
        q, k, v = (self.split(y @ self.w[f"{name}.{part}.weight"].T) for part in ("wq", "wk", "wv"))
        q = self.half_rotated(rms(q) * self.w[f"{name}.q_norm.weight"][:, None], positions)
        k = self.half_rotated(rms(k) * self.w[f"{name}.k_norm.weight"][:, None], positions)
        keys = np.concatenate([k, *(scale * keys for keys, _, _, scale in given)], axis=1)
        values = np.concatenate([v, *(scale * values for _, values, _, scale in given)], axis=1)
        mask = np.concatenate([np.ones(len(x), bool), *(seen for _, _, seen, _ in given)])
        out = attend(q, keys, values, mask)
        gate = sigmoid(y @ self.w[f"{name}.gate.weight"].T)
        x = x + m[2] * ((out.transpose(1, 0, 2).reshape(len(x), -1) * gate) @ self.w[f"{name}.wo.weight"].T)
        y = rms(x) * (1 + m[4]) + m[3]
        return x + m[5] * self.mlp(f"blocks.{layer}.mlp", y)

    def patches(self, of: str, latents: np.ndarray) -> np.ndarray:
        """Return the states of an encoder of latents, [batch, patches, its width]."""
        batch, frames, channels = latents.shape
        x = latents.astype(np.float64).reshape(batch, frames // self.patch, self.patch * channels)
        x = self.linear(f"{of}_encoder.in_proj", x) / 6
        return self.encoded(of, x, np.tril(np.ones((x.shape[1], x.shape[1]), bool)))

    def encoded(self, of: str, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
        layers = {int(name.split(".")[2]) for name in self.w if name.startswith(f"{of}_encoder.blocks.")}
        positions = np.arange(x.shape[1])
        for layer in sorted(layers):
            name = f"{of}_encoder.blocks.{layer}"
            y = rms(x) * self.w[f"{name}.attention_norm.weight"]
            heads = len(self.w[f"{name}.attention.q_norm.weight"])
            q, k, v = (self.split(y @ self.w[f"{name}.attention.{part}.weight"].T, heads) for part in ("wq", "wk", "wv"))
            q = rotated(rms(q) * self.w[f"{name}.attention.q_norm.weight"][:, None], positions)
            k = rotated(rms(k) * self.w[f"{name}.attention.k_norm.weight"][:, None], positions)
            out = np.moveaxis(attend(q, k, v, mask), -3, -2).reshape(x.shape)
            gate = sigmoid(y @ self.w[f"{name}.attention.gate.weight"].T)
            x = x + (out * gate) @ self.w[f"{name}.attention.wo.weight"].T
            x = x + self.mlp(f"{name}.mlp", rms(x) * self.w[f"{name}.mlp_norm.weight"])
        return rms(x) * self.w[f"{of}_norm.weight"]

    def keys_values(self, of: str, state: np.ndarray) -> dict[str, np.ndarray]:
        keys, values = [], []
        for layer in range(self.layers):
            name = f"blocks.{layer}.attention"
            k = self.split(state @ self.w[f"{name}.wk_{of}.weight"].T)
            keys.append(rms(k) * self.w[f"{name}.k_norm.weight"][:, None])
            values.append(self.split(state @ self.w[f"{name}.wv_{of}.weight"].T))
        return {f"{of}_keys": np.stack(keys, axis=1), f"{of}_values": np.stack(values, axis=1)}

    def split(self, x: np.ndarray, heads: int | None = None) -> np.ndarray:
        """Return [..., heads, n, head_dim] of [..., n, width]."""
        return np.moveaxis(x.reshape(*x.shape[:-1], heads or self.heads, -1), -2, -3)

    def half_rotated(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        half = self.heads // 2
        return np.concatenate([rotated(x[..., :half, :, :], positions), x[..., half:, :, :]], axis=-3)

    def mlp(self, name: str, x: np.ndarray) -> np.ndarray:
        hidden = silu(x @ self.w[f"{name}.w1.weight"].T) * (x @ self.w[f"{name}.w3.weight"].T)
        return hidden @ self.w[f"{name}.w2.weight"].T

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]


class ReferenceEngine:
    """An engine that runs one role. As engines may, each call overwrites the results of the call before it."""

    provider = "cpu"
    traits = Traits()

    def __init__(self, dit: ReferenceDiT, spec: GraphSpec, role: str) -> None:
        self.spec, self._run = spec, getattr(dit, role)
        self.calls: list[dict[str, np.ndarray]] = []
        """The feeds of every call, as they were."""
        self._results: dict[str, np.ndarray] = {}

    def new_state(self, **dims: int) -> Any:
        raise AssertionError("no graph of a diffusion model has a state")

    def run(self, feeds: Mapping[str, Any], state: None = None, resident: Collection[str] = ()) -> dict[str, Any]:
        check_feeds(self.spec, feeds, {})
        self.calls.append({name: np.array(feed) for name, feed in feeds.items()})
        found = {name: array.astype(np.float32) for name, array in self._run(**feeds).items()}
        for array in self._results.values():
            array.fill(np.nan)
        self._results = found
        return dict(found)


def reference_engines(dit: ReferenceDiT) -> dict[str, ReferenceEngine]:
    """Return the engines of a bundle by role, without the codec's."""
    specs = diffusion_specs(dit.model())
    return {role: ReferenceEngine(dit, spec, role) for role, spec in specs.items() if not role.startswith("codec")}


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    scores = np.where(mask, q @ np.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1]), -np.inf)
    exp = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True) @ v


def rotated(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return x [..., n, width] rotated at positions [n], in interleaved pairs."""
    width = x.shape[-1]
    angle = positions[:, None] * BASE ** (-np.arange(0, width, 2) / width)
    cos, sin = np.cos(angle), np.sin(angle)
    out = np.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    out[..., 1::2] = x[..., 1::2] * cos + x[..., 0::2] * sin
    return out


def rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)
