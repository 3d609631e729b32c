#!/usr/bin/env bash
# All weights, 4 processes, one GPU each, FSDP2. Not measured by this project; meant for 4 x 80 GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/env.sh
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0,1,2,3}
source scripts/launch.sh
processes=${NPROC_PER_NODE:-4}

launch "$processes" llm_sft.py \
    --model_type qwen2.5-7b-instruct \
    --sft_type full \
    --dataset alpaca-zh alpaca-en \
    --gradient_checkpointing true \
    --fsdp true \
    --gradient_accumulation_steps $((16 / processes / ${NNODES:-1})) \
    -- "$@"
