#!/usr/bin/env bash
# Is this project right on a GPU, how fast is it, and how much memory does it take? Works with and without network.
#
#   bash benchmarks/gpu.sh [FOLDER [SECONDS [WORD ...]]]     (default: benchmarks/results/gpu, 450 seconds)
#
# Words after the seconds go to benchmarks/gpu.py, for example --only pieces,speed. Packages that the machine lacks are
# unpacked from wheels in .whl/, which benchmarks/gpu_wheels.sh fetches. Written for one H200; one GPU is used.
# Without a GPU, the parts that need one say so, and the other parts run on the CPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-benchmarks/results/gpu}
seconds=${2:-450}
shift $(($# < 2 ? $# : 2))
python=${PYTHON:-python3}

if [[ -d .whl ]]; then
    site=$(mktemp -d)
    for wheel in .whl/*.whl; do
        "$python" -m zipfile -e "$wheel" "$site" &
    done
    wait
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi

export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
exec timeout -k 10 "$((seconds + 25))" "$python" benchmarks/gpu.py --seconds "$seconds" --out "$folder" "$@"
