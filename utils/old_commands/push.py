"""The old command `python -m utils.push`: prints the name of the new command, then runs the new command."""

from __future__ import annotations

import sys

from utils.export.push import main

if __name__ == '__main__':
    print('python -m utils.push is now: python -m utils.export.push RUN', file=sys.stderr)
    sys.exit(main(sys.argv[1:]))
