#!/usr/bin/env bash
# QLoRA, one GPU. Measured in 2023: A10, 3090, 16 GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/env.sh
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}

python llm_sft.py \
    --model_type qwen-14b-chat \
    --train_dataset_sample -1 \
    --quantization_bit 4 \
    --lora_target_modules ALL \
    --gradient_checkpointing true \
    -- "$@"
