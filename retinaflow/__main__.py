"""The program: ``retinaflow COMMAND``, or ``python -m retinaflow COMMAND``."""

import signal
import sys
from typing import NoReturn

from retinaflow.interrupts import STOPPED, stopping_at_once


def program() -> NoReturn:
    """Run the command line and end the process. A stop is one line on stderr, from before the long imports on."""
    with stopping_at_once():
        try:
            from retinaflow.cli import main

            code = main()
        except KeyboardInterrupt as stop:
            print(f"stopped: {stop}", file=sys.stderr)
            code = STOPPED
    if code == STOPPED:
        # Several signals may belong to one stop, and Python takes a moment to end.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


if __name__ == "__main__":
    program()
