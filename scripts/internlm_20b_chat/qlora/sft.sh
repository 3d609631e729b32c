#!/usr/bin/env bash
# QLoRA, one GPU. Measured in 2023: A10, 18 GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/env.sh
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}

python llm_sft.py \
    --model_type internlm-20b-chat \
    --dataset damo-agent-mini-zh \
    --max_length 4096 \
    --quantization_bit 4 \
    --lora_target_modules q_proj v_proj \
    --gradient_checkpointing true \
    -- "$@"
