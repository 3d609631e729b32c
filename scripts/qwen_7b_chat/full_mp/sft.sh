#!/usr/bin/env bash
# All weights, layers spread over 2 GPUs. Measured in 2023: 2 x A100, 75 GB each with flash-attn.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/env.sh
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0,1}

python llm_sft.py \
    --model_type qwen-7b-chat \
    --sft_type full \
    --dataset damo-agent-zh \
    --train_dataset_sample 200000 \
    --max_length 8192 \
    -- "$@"
