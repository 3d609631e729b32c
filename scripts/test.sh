#!/usr/bin/env bash
# Lint, types, shell scripts, generated parts of the pages, tests. Makes .venv on first use.
#
#   bash scripts/test.sh [--quick] [WORD ...]
#
# --quick runs only the tests that take seconds, in one process and without optional libraries: 3 to 4 minutes on 2 CPU cores.
# The words go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

only=()
if [[ ${1:-} == --quick ]]; then
    shift
    only=(-m 'not slow and not processes and not optional and not gpu')
    export OMP_NUM_THREADS=1 # tiny models only wait for a second thread
fi
make_venv all requirements-all.txt

export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
mypy utils tools llm_sft.py llm_infer.py
find scripts .ci -name '*.sh' -print0 | xargs -0 shellcheck -x
shellcheck .ci/run
python -m tools.docs --check
python -m pytest -q "${only[@]}" "$@"
