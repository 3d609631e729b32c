"""`python -m utils.compare RUN OTHER` of earlier versions: names `python -m utils.report RUN OTHER` and does it."""

from __future__ import annotations

import sys

from utils.report.__main__ import main

if __name__ == '__main__':
    print('python -m utils.compare is now: python -m utils.report RUN OTHER', file=sys.stderr)
    sys.exit(main(sys.argv[1:]))
