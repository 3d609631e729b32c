#!/usr/bin/env bash
# LoRA, 2 processes, one GPU each. Measured in 2023: A100.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/env.sh
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0,1}
source scripts/launch.sh
processes=${NPROC_PER_NODE:-2}

launch "$processes" llm_sft.py \
    --model_type internlm-20b \
    --template_type default-generation \
    --dataset jd-zh \
    --train_dataset_sample -1 \
    --gradient_accumulation_steps $((16 / processes / ${NNODES:-1})) \
    -- "$@"
