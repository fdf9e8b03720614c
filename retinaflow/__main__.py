"""``python -m retinaflow COMMAND``."""

import sys

from retinaflow.cli import main

if __name__ == "__main__":
    sys.exit(main())
