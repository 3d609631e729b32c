#!/usr/bin/env bash
# Training speed compared with Trainer + PEFT and TRL, with pinned packages. --quick takes under 10 minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
[[ -x $python ]] || python=python

"$python" benchmarks/train.py "$@"
