#!/usr/bin/env bash
# QLoRA (4-bit base) on one GPU. Not measured by this project; meant for 1 x 12 GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/env.sh
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}

python llm_sft.py \
    --model_type llama2-7b-chat \
    --dataset sql-demo \
    --quantization_bit 4 \
    --gradient_checkpointing true \
    -- "$@"
