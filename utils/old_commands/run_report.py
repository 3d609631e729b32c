"""The old command `python -m utils.run_report`: prints the name of the new command, then runs the new command."""

from __future__ import annotations

import sys

from utils.report.__main__ import main

if __name__ == '__main__':
    print('python -m utils.run_report is now: python -m utils.report RUN', file=sys.stderr)
    sys.exit(main(sys.argv[1:]))
