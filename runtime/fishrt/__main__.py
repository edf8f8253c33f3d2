"""The program `fishrt`, and `python -m fishrt`."""

import os
import signal


def run() -> None:
    """Run the command line. An interruption while its modules are imported ends the process at once, without a traceback."""

    def leave(*_: object) -> None:
        os.write(2, b"interrupted\n")
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)
    if before != signal.SIG_IGN:  # a shell ignores it in the background
        signal.signal(signal.SIGINT, leave)
    from .cli import main

    signal.signal(signal.SIGINT, before)
    main(prog_name="fishrt")


if __name__ == "__main__":
    run()
