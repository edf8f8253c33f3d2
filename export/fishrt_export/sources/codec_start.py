"""The start state of a codec whose streams would begin with a tick from zeros; see `fishrt.bundle.codec_start`.

The exported graphs decide it with silence. Official codecs have no tick, since every crop of their training began from zeros. No
state is then written, and streams begin as upstream's do.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fishrt.arrays import Pcm
from fishrt.bundle.codec_start import CODEC_START
from fishrt.bundle.features import Codec
from fishrt.codec import CodecDecoder, CodecEncoder
from fishrt_engines import open_engine
from fishrt_engines.engine import GraphSpec

from ..models.codec.decoding import COLUMNS

AUDIBLE = 10 ** (-50 / 20)
"""Least peak that counts as a tick in the first MOMENT_S of silence: 50 dB below full scale."""
MOMENT_S = 0.02
_FRAMES = 16
"""Frames of silence, far more than the state needs to settle."""


def write_start(folder: Path, encode_spec: GraphSpec, spec: GraphSpec, codec: Codec) -> None:
    """Write `codec_start.npz` into a bundle's folder if silence begins with a tick from zeros, but without one after silence.

    encode_spec, spec: of the portable codec_encode and codec_decode.
    The file has the state of convolutions only. Attention masks the positions before the stream.
    """
    columns = [tensor.name for tensor in spec.state_tensors if tensor.name.startswith(COLUMNS)]
    if not columns or codec.channels is not None:  # a codec of latents is an official one
        return
    encode, decode = (open_engine(folder / graph.file, graph, provider="cpu") for graph in (encode_spec, spec))
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
