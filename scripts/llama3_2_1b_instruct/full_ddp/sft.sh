#!/usr/bin/env bash
# All weights, 2 processes, one GPU each. Not measured by this project; meant for 2 x 40 GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/env.sh
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0,1}
source scripts/launch.sh
processes=${NPROC_PER_NODE:-2}

launch "$processes" llm_sft.py \
    --model_type llama3.2-1b-instruct \
    --sft_type full \
    --dataset alpaca-en \
    --gradient_checkpointing true \
    --gradient_accumulation_steps $((16 / processes / ${NNODES:-1})) \
    -- "$@"
