#!/usr/bin/env bash
# QLoRA, 2 processes, one GPU each, DeepSpeed ZeRO-2, on int4 weights from the hub. Measured in 2023: 2 x A10, 16 GB each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/env.sh
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0,1}
source scripts/launch.sh
processes=${NPROC_PER_NODE:-2}

launch "$processes" llm_sft.py \
    --model_type qwen-7b-chat-int4 \
    --dataset damo-agent-mini-zh \
    --max_length 4096 \
    --lora_target_modules ALL \
    --gradient_checkpointing true \
    --deepspeed_config_path ds_config/zero2.json \
    --gradient_accumulation_steps $((16 / processes / ${NNODES:-1})) \
    -- "$@"
