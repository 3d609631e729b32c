#!/usr/bin/env bash
# All weights, one GPU. Measured in 2023: A10, 12 GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/env.sh
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}

python llm_sft.py \
    --model_type seqgpt-560m \
    --sft_type full \
    --dataset ner-jave-zh \
    --train_dataset_sample -1 \
    --num_train_epochs 3 \
    --max_length 1024 \
    --gradient_checkpointing true \
    --batch_size 4 \
    --only_save_model false \
    --gradient_accumulation_steps 8 \
    -- "$@"
