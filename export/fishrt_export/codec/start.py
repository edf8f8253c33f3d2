"""Whether a codec's streams begin with a tick, and the state that spares them it; see `fishrt.codec_start`.

Decided by what the exported graphs give for silence: official codecs learned to begin from zeros, since every crop of their
training began so. Then nothing is written, and streams begin as upstream's do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fishrt.arrays import Pcm
from fishrt.codec import CodecDecoder, CodecEncoder
from fishrt.codec_start import CODEC_START
from fishrt.features import Codec
from fishrt_engines import open_engine
from fishrt_engines.spec import GraphSpec

from .decoding import COLUMNS

AUDIBLE = 10 ** (-50 / 20)
"""Peak from which on the first moment of silence is a tick: 50 dB below full scale."""
MOMENT_S = 0.02
_FRAMES = 16
"""Of silence; the state has settled long before."""


def write_start(folder: Path, graphs: Mapping[str, GraphSpec], codec: Codec) -> None:
    """Write `codec_start.npz` into a bundle's folder where silence begins with a tick from zeros, and without one after silence.

    Only layers that look back at columns get that state. Attention does not need it: it masks what was not there.
    """
    spec = graphs["codec_decode"]
    columns = [tensor.name for tensor in spec.state_tensors if tensor.name.startswith(COLUMNS)]
    if not columns:
        return
    encode, decode = (open_engine(folder / graph.file, graph, provider="cpu") for graph in (graphs["codec_encode"], spec))
    codes = CodecEncoder(encode, codec).encode(np.zeros(_FRAMES * codec.hop, np.float32))
    state, frames = decode.new_state(batch=1), codes.shape[1]
    feeds = {"codes": codes[None], "position_ids": np.arange(frames)[None]}
    decode.run({tensor.name: feeds[tensor.name] for tensor in spec.feeds}, state)
    start = {name: state.read(name) for name in columns}
    from_zeros, from_silence = (_peak(CodecDecoder(decode, codec, begin).decode(codes), codec) for begin in ({}, start))
    if from_silence < AUDIBLE <= from_zeros:
        np.savez(folder / CODEC_START, **start)  # type: ignore[arg-type]


def _peak(pcm: Pcm, codec: Codec) -> float:
    return float(np.abs(pcm[: round(MOMENT_S * codec.sample_rate)]).max())
