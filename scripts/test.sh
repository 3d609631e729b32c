#!/usr/bin/env bash
# Lint, types, shell scripts, generated parts of the pages, tests. Makes .venv on first use.
#
#   bash scripts/test.sh [--quick] [WORD ...]
#
# --quick runs only the tests that take seconds, without tests of several processes and of optional libraries.
# The words go to pytest. Its tests run in as many processes as there are CPU cores, at most 4; -n 0 runs them in one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

only=()
if [[ ${1:-} == --quick ]]; then
    shift
    only=(-m 'not slow and not processes and not optional and not gpu')
fi
# Tiny models only wait for a second thread. So each process gets one thread, and the tests of a file stay in one process.
export OMP_NUM_THREADS=1
make_venv all requirements-all.txt

export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
mypy utils tools llm_sft.py llm_infer.py
find scripts .ci -name '*.sh' -print0 | xargs -0 shellcheck -x
shellcheck .ci/run
python -m tools.docs --check
python -m pytest -q -n auto --maxprocesses 4 --dist loadfile "${only[@]}" "$@"
