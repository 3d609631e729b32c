"""`python -m utils.report RUN [OTHER]`: write report.html of a run again, or compare two runs or sets of answers."""

from __future__ import annotations

if __name__ == '__main__':
    from utils.base.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.base.errors import ConfigError
from utils.base.logger import replace_unprintable
from utils.report.compare import compare_runs
from utils.report.html import write_report
from utils.report.rows import compare_answers


def main(argv: Sequence[str]) -> int:
    """Write report.html of a run again or, if two runs are given, compare them.

    Returns the exit code: 0, or 2 for a problem.
    """
    parser = argparse.ArgumentParser(
        prog='python -m utils.report',
        description='Write report.html of a run again, or compare two runs or two files of answers.',
    )
    parser.add_argument('run', type=Path, help='run folder, or a file that llm_infer.py wrote')
    parser.add_argument('other', type=Path, nargs='?', help='another one, to compare with')
    parser.add_argument(
        '--html',
        type=Path,
        help='page of the comparison (default: compare_<run>_<other>.html in the folder of the run)',
    )
    words = parser.parse_args(argv)
    page = words.html
    if page is None and words.other is not None:
        page = _page_of(words.run, words.other)
    try:
        if words.other is None:
            print(write_report(words.run))
        elif words.run.is_file() or words.other.is_file():
            compare_answers(words.run, words.other, page)
        else:
            compare_runs(words.run, words.other, page)
    except ConfigError as error:
        for problem in error.problems:
            print(f'error: {problem}', file=sys.stderr)
        return 2
    return 0


def _page_of(run: Path, other: Path) -> Path:
    """Return the default path of the page with a comparison: compare_<run>_<other>.html in the folder `run`.

    If `run` is a file of answers, the path is in the folder of this file.
    """
    names = [path.stem if path.is_file() else path.absolute().name for path in (run, other)]
    return (run.parent if run.is_file() else run) / f'compare_{"_".join(names)}.html'


if __name__ == '__main__':
    replace_unprintable()
    sys.exit(main(sys.argv[1:]))
