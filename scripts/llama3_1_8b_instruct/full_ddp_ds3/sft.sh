#!/usr/bin/env bash
# All weights, 8 processes, one GPU each, DeepSpeed ZeRO-3. Not measured by this project; meant for 8 x 40 GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/env.sh
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0,1,2,3,4,5,6,7}
source scripts/launch.sh
processes=${NPROC_PER_NODE:-8}

launch "$processes" llm_sft.py \
    --model_type llama3.1-8b-instruct \
    --sft_type full \
    --dataset alpaca-en \
    --gradient_checkpointing true \
    --deepspeed_config_path ds_config/zero3.json \
    --gradient_accumulation_steps $((16 / processes / ${NNODES:-1})) \
    -- "$@"
