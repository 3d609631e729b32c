#!/usr/bin/env bash
# QLoRA, one GPU, on int4 weights from the hub. Measured in 2023: V100, A10, 3090, 21 GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/env.sh
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}

python llm_sft.py \
    --model_type qwen-14b-chat-int4 \
    --dataset leetcode-python-en \
    --train_dataset_sample -1 \
    --max_length 4096 \
    --lora_target_modules ALL \
    --gradient_checkpointing true \
    -- "$@"
