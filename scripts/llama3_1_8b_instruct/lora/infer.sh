#!/usr/bin/env bash
# Answer the validation rows of a checkpoint, or chat with --eval_human true.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/env.sh
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}

python llm_infer.py --ckpt_dir "${1:?usage: infer.sh CHECKPOINT [FLAGS]}" "${@:2}"
