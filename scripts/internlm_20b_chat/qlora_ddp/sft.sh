#!/usr/bin/env bash
# QLoRA, 2 processes, one GPU each. Measured in 2023: 2 x A10, 21 GB each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/env.sh
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0,1}
source scripts/launch.sh
processes=${NPROC_PER_NODE:-2}

launch "$processes" llm_sft.py \
    --model_type internlm-20b-chat \
    --dataset damo-agent-mini-zh \
    --max_length 4096 \
    --quantization_bit 4 \
    --lora_target_modules q_proj v_proj \
    --gradient_checkpointing true \
    --gradient_accumulation_steps $((16 / processes / ${NNODES:-1})) \
    -- "$@"
