#!/usr/bin/env bash
# LoRA, 2 processes of 2 GPUs each. Measured in 2023: 4 x 3090, 22 GB each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/env.sh
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0,1,2,3}
source scripts/launch.sh
processes=${NPROC_PER_NODE:-2}

launch "$processes" llm_sft.py \
    --model_type baichuan2-13b-chat \
    --train_dataset_sample -1 \
    --gradient_checkpointing true \
    --gradient_accumulation_steps $((16 / processes / ${NNODES:-1})) \
    -- "$@"
