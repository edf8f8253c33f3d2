"""The server's page in a browser of Playwright: what it asks for, and what is heard."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from serving import Server

LISTEN = """
window.heard = [];      // parts for the loudspeaker: { at (time of its context), sounds (time of the page), rate, samples }
window.replied = [];    // when the body of a reply had been read, in the time of the page
const start = AudioBufferSourceNode.prototype.start;
AudioBufferSourceNode.prototype.start = function (at) {
  const { currentTime, sampleRate: rate } = this.context;
  const sounds = performance.now() + (at - currentTime) * 1000;
  heard.push({ at, sounds, rate, samples: [...this.buffer.getChannelData(0)] });
  return start.call(this, at);
};
const read = ReadableStreamDefaultReader.prototype.read;
ReadableStreamDefaultReader.prototype.read = async function () {
  const part = await read.call(this);
  if (part.done) replied.push(performance.now());
  return part;
};
"""
"""Notes what the page gives to the loudspeaker and when replies end. Run it before the scripts of the page."""


def until(page: Any, condition: str) -> None:
    """Wait until something holds in the page. (Playwright's own wait needs `eval` there, which the policy forbids.)"""
    end = time.monotonic() + 30
    while not page.evaluate(condition):
        assert time.monotonic() < end, (condition, page.text_content("#error"))
        page.wait_for_timeout(20)


def speak(page: Any, text: str | None = None, *, takes: int = 1) -> Any:
    """Speak, wait for the end, and return the body of the request."""
    if text is not None:
        page.fill("#text", text)
    with page.expect_request("**/audio/speech") as asked:
        page.click("#speak")
    until(page, f"document.querySelectorAll('#history li').length === {takes}")
    return asked.value.post_data_json


def pcm(server: Server, body: dict[str, Any]) -> np.ndarray:
    """The samples of a request, from another client."""
    reply = server.ask("POST", "/v1/audio/speech", body)
    assert reply.status == 200
    return np.frombuffer(reply.read(), "<i2")


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether the sound is the same; the codec's chunks may end elsewhere, which changes the rounding of a sample."""
    return one.shape == other.shape and int(np.abs(one.astype(int) - other).max()) <= 1


def heard(page: Any) -> np.ndarray:
    """The samples that the loudspeaker was given, int16."""
    parts = page.evaluate("heard.map(({ samples }) => samples)")
    return np.round(np.concatenate([np.array(part) for part in parts]) * 32768).astype(np.int16)
