#!/usr/bin/env bash
# Every check: lint, types, shell scripts, generated pages, all tests. Creates .venv on first use.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh
make_venv all requirements-all.txt

export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
mypy utils tools llm_sft.py llm_infer.py
find scripts .ci -name '*.sh' -print0 | xargs -0 shellcheck -x
shellcheck .ci/run
python -m tools.docs --check
python -m pytest -q "$@"
