#!/usr/bin/env bash
# QLoRA, one GPU, on int4 weights from the hub. Measured in 2023: A10, 11 GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/env.sh
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}

python llm_sft.py \
    --model_type qwen-vl-chat-int4 \
    --dataset coco-en \
    --lora_target_modules q_proj k_proj v_proj o_proj \
    --gradient_checkpointing true \
    -- "$@"
