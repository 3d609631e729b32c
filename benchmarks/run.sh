#!/usr/bin/env bash
# Training speed beside Trainer + PEFT and TRL, on pinned packages alone: --quick for under 10 minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
[[ -x $python ]] || python=python

"$python" benchmarks/train.py "$@"
