#!/usr/bin/env bash
# QLoRA, one GPU. Measured in 2023: 3090, 10 GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/env.sh
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}

python llm_sft.py \
    --model_type baichuan2-7b \
    --template_type default-generation \
    --dataset advertise-gen-zh \
    --quantization_bit 4 \
    --lora_target_modules ALL \
    --gradient_checkpointing true \
    -- "$@"
