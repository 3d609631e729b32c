#!/usr/bin/env bash
# LoRA, one GPU. Measured in 2023: A100, 60 GB with flash-attn.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/env.sh
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}

python llm_sft.py \
    --model_type qwen-7b-chat \
    --dataset damo-agent-mini-zh \
    --train_dataset_sample -1 \
    --max_length 4096 \
    --lora_target_modules ALL \
    -- "$@"
