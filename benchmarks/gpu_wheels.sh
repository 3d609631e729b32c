#!/usr/bin/env bash
# Fetch the wheels that a GPU machine without network needs for benchmarks/gpu.sh, into .whl/ (about 25 MB, not in git).
#
#   bash benchmarks/gpu_wheels.sh [PYTHON_VERSION]     (default: 3.12, that of the GPU machine)
#
# The machine must have torch with CUDA, numpy, safetensors, tokenizers, accelerate, pandas, pyarrow, xxhash and psutil.
# Run this on a machine with network. The versions are those of constraints.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
version=${1:-3.12}
python=${PYTHON:-python3}

# What each is for: the project; the peers that it is compared with; quantised layers; generated answers that are scored.
names=(transformers peft trl liger-kernel datasets dill multiprocess bitsandbytes nltk)
# These packages have no wheels on the index. They are built here.
sources=(rouge-score)

mkdir -p .whl
pinned=()
for name in "${names[@]}"; do
    pinned+=("$(grep -i -m1 "^${name//-/[-_]}==" constraints.txt || echo "$name")")
done
"$python" -m pip download --no-deps --only-binary :all: --python-version "$version" --platform manylinux_2_28_x86_64 \
    --platform manylinux2014_x86_64 --platform manylinux_2_24_x86_64 --platform any -d .whl "${pinned[@]}"
"$python" -m pip wheel --no-deps -w .whl "${sources[@]}"

# bitsandbytes has a library for each version of CUDA. Only the newest two and the one for CPUs are kept.
folder=$(mktemp -d)
for wheel in .whl/bitsandbytes-*.whl; do
    "$python" -m zipfile -e "$wheel" "$folder"
    find "$folder/bitsandbytes" -name 'libbitsandbytes_cuda*.so' | sort -V | head -n -2 | xargs -r rm
    (cd "$folder" && "$python" -m zipfile -c wheel.whl bitsandbytes bitsandbytes-*.dist-info)
    mv "$folder/wheel.whl" "$wheel"
done
du -ch .whl/*.whl
