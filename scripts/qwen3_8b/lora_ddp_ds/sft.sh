#!/usr/bin/env bash
# LoRA, 2 processes, one GPU each, DeepSpeed ZeRO-2. Not measured by this project; meant for 2 x 24 GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/env.sh
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0,1}
source scripts/launch.sh
processes=${NPROC_PER_NODE:-2}

launch "$processes" llm_sft.py \
    --model_type qwen3-8b \
    --dataset alpaca-zh alpaca-en \
    --gradient_checkpointing true \
    --deepspeed_config_path ds_config/zero2.json \
    --gradient_accumulation_steps $((16 / processes / ${NNODES:-1})) \
    -- "$@"
