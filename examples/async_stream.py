"""Stream speech in asyncio: `python async_stream.py [TEXT]`. The event loop goes on with other work, such as other requests."""

import asyncio
import sys
import time

from fishrt import TTS


async def main(text: str) -> None:
    """Print when each chunk of speech arrives."""
    with TTS.load() as tts:
        begun = time.perf_counter()
        async for chunk in tts.astream(text, voice="awb", seed=7):
            # A server would send chunk.pcm here: float32 [samples], mono, -1..1, at tts.sample_rate.
            print(f"after {time.perf_counter() - begun:.2f} s: {len(chunk.pcm) / tts.sample_rate:.2f} s of speech")


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "Each chunk is sent as soon as it is made."))
