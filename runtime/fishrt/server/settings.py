"""The settings of a server: one field for each flag of `fishrt serve`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of a server.

    Attributes:
        host: address or name to listen on.
        port: TCP port; 0 lets the system choose one.
        api_key: the key that clients must send; None: everybody may use the server.
        max_queue: requests that may wait. The next one is refused with 429.
        max_wait: seconds that a request may wait; then it is refused with 429, too. None: any time.
        max_active: requests that speak at the same time.
        max_text_length: longest text of a request, in characters; 0: any length that fits in a body.
        cors_origins: origins of web pages that may use the server, such as "https://example.com"; "*": all. Without a key,
            a server on a loopback address is asked by names of this machine or by the hosts of these.
        strict_voices: whether OpenAI's names of voices are unknown, unless there is a voice of that name.
        pcm_rate: sample rate of raw samples if a request names none, in Hz; None: the model's, or 24 kHz for OpenAI's models.
        media_dir: folder below which requests may name recordings by `file:`; None: nowhere.
        allow_url_refs: whether a request may name a recording by its URL, which the server then fetches.
        wyoming_port: TCP port of the Wyoming protocol; None: it is not spoken.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = field(default=None, repr=False)
    max_queue: int = 64
    max_wait: float | None = None
    max_active: int = 8
    max_text_length: int = 50_000
    cors_origins: tuple[str, ...] = ()
    strict_voices: bool = False
    pcm_rate: int | None = None
    media_dir: Path | None = None
    allow_url_refs: bool = False
    wyoming_port: int | None = None
