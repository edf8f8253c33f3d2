"""The base of models that are verified in stretches of a few blocks: see graph/stretches.py."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Stack(nn.Module):
    """Blocks between what makes their first input and what makes the results of their last output.

    A model adds `enter` and `leave` for these, and `run_layers`, which takes the stream, the feeds that all blocks share and the
    caches, each by name, and a slice of the blocks. It returns the stream and the updated caches. Each block begins with the norm
    `layers.<i>.attention_norm`.
    """

    ENTERS: tuple[str, ...]
    """Names of the feeds of `enter`."""
    SHARED: tuple[str, ...]
    """Names of the feeds of `run_layers`, of which a model may lack some."""
    LEAVES: tuple[str, ...]
    """Names of the feeds of `leave`, after the stream."""
    STREAM: tuple[str, str]
    """Dimensions of the stream, before its width."""
    ENTRY: tuple[str, ...] = ()
    """Starts of the names of the weights of `enter`, beside embeddings."""
    width: int
    """Width of the stream."""
    layers: nn.ModuleList
    enter: Callable[..., Tensor]
    run_layers: Callable[..., tuple[Tensor, list[Tensor]]]
    leave: Callable[..., tuple[Tensor, ...]]
