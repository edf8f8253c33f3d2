"""The command line: `fishrt speak | voice | export | …`.

Results go to standard output, everything else to standard error. For the exit status see `EXIT_STATUSES` in base/commands.py, for
the JSON objects docs/json.md. Heavy modules are imported inside the commands.
"""

from __future__ import annotations

import click

from .base.commands import EXIT_STATUSES, Commands, completion, show_help
from .bench import bench
from .bundles.build_trt import build_trt
from .bundles.export import export
from .bundles.fetch import fetch
from .bundles.inspect import inspect
from .bundles.retarget import retarget
from .codec import codec
from .doctor import doctor
from .render import render
from .serve import serve
from .speak import speak
from .voice import voice


@click.group(cls=Commands, context_settings={"max_content_width": 110}, add_help_option=False, epilog=EXIT_STATUSES)
def main() -> None:
    """Fish Speech text-to-speech from ONNX bundles, without torch.

    \b
    Speak with the embedded voice:
      fishrt speak "Good morning." -o hello.wav
    Turn the weights of an official model into a bundle, a folder that fishrt speaks from:
      fishrt export fishaudio/openaudio-s1-mini BUNDLE
    Speak with that bundle in the voice of a recording:
      fishrt speak --bundle BUNDLE --reference me.wav --reference-text "The words of me.wav." "Good morning."
    """


_ALL = (speak, render, serve, voice, export, retarget, fetch, codec, inspect, bench, doctor, build_trt, completion, show_help)
for command in _ALL:
    main.add_command(command)
