#!/usr/bin/env bash
# QLoRA, one GPU. Measured in 2023: A10, 10 GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/env.sh
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}

python llm_sft.py \
    --model_type qwen-vl-chat \
    --dataset coco-en \
    --quantization_bit 4 \
    --lora_target_modules q_proj k_proj v_proj o_proj \
    --gradient_checkpointing true \
    -- "$@"
