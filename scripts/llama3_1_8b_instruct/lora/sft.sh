#!/usr/bin/env bash
# LoRA, one GPU. Not measured by this project; meant for 1 x 40 GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/env.sh
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}

python llm_sft.py \
    --model_type llama3.1-8b-instruct \
    --dataset alpaca-en \
    --gradient_checkpointing true \
    -- "$@"
