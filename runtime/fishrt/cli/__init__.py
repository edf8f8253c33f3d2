"""The command line: `fishrt speak | voice | codec | export | build-trt | inspect | bench | doctor`.

Results go to standard output, everything else to standard error. Exit status: 0 done, 2 a mistake that the user can mend (printed
as `error: …` and `hint: …`), 130 interrupted, 1 anything else: nobody reads the output any more, or a
bug. Heavy modules are imported inside the commands.
"""

from __future__ import annotations

import click

from ..version import __version__
from .base import Commands, debug_option
from .bench import bench
from .build_trt import build_trt
from .bundles import doctor, export, inspect
from .codec import codec
from .speak import speak
from .voice import voice


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="fishrt")
@debug_option
def main() -> None:
    """Fish Speech text-to-speech from ONNX bundles, without torch.

    \b
    fishrt speak "Good morning." -o hello.wav
    fishrt export CHECKPOINT BUNDLE
    fishrt speak --bundle BUNDLE --reference me.wav --reference-text "What I say in it." "Good morning."
    """


for command in (speak, voice, codec, export, build_trt, inspect, bench, doctor):
    main.add_command(command)
