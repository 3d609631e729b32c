#!/usr/bin/env bash
# LoRA on one GPU. Not measured by this project; meant for 1 x 24 GB (bf16 weights take 13 GB).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/env.sh
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}

python llm_sft.py \
    --model_type llama2-7b-chat \
    --dataset sql-demo \
    --gradient_checkpointing true \
    -- "$@"
