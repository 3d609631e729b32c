#!/usr/bin/env bash
# LoRA, layers spread over 2 GPUs. Not measured by this project; meant for 2 x 40 GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/env.sh
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0,1}

python llm_sft.py \
    --model_type gpt-oss-20b \
    --dataset alpaca-en \
    --gradient_checkpointing true \
    -- "$@"
