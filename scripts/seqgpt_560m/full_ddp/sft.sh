#!/usr/bin/env bash
# All weights, 2 processes, one GPU each. Measured in 2023: 2 x A10, 13 GB each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/env.sh
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0,1}
source scripts/launch.sh
processes=${NPROC_PER_NODE:-2}

launch "$processes" llm_sft.py \
    --model_type seqgpt-560m \
    --sft_type full \
    --dataset ner-jave-zh \
    --train_dataset_sample -1 \
    --num_train_epochs 3 \
    --max_length 1024 \
    --gradient_checkpointing true \
    --batch_size 4 \
    --only_save_model false \
    --gradient_accumulation_steps $((8 / processes / ${NNODES:-1})) \
    -- "$@"
