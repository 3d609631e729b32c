#!/usr/bin/env bash
# All weights, 2 processes of 2 GPUs each. Measured in 2023: 4 x A100, 75 GB each with flash-attn.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/env.sh
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0,1,2,3}
source scripts/launch.sh
processes=${NPROC_PER_NODE:-2}

launch "$processes" llm_sft.py \
    --model_type qwen-7b-chat \
    --sft_type full \
    --dataset medical-en medical-zh \
    --train_dataset_sample 200000 \
    --max_length 8192 \
    --gradient_accumulation_steps $((16 / processes / ${NNODES:-1})) \
    -- "$@"
