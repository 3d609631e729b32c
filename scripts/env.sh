# shellcheck shell=bash
# Sourced by every sft.sh and infer.sh: uses .venv if it exists and no other environment is active.
if [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" && -x .venv/bin/python ]]; then
    export PATH="$PWD/.venv/bin:$PATH"
fi
