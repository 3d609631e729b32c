#!/usr/bin/env bash
# QLoRA, layers spread over 2 GPUs. Measured in 2023: 2 x 3090, 23 GB each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/env.sh
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0,1}

python llm_sft.py \
    --model_type openbuddy-llama2-70b-chat \
    --train_dataset_sample -1 \
    --quantization_bit 4 \
    --lora_target_modules q_proj v_proj \
    --gradient_checkpointing true \
    -- "$@"
