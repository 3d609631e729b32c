#!/usr/bin/env bash
# All weights on one process, held in fp32. Runs on a CPU: 2 cores, about 5 GiB of memory.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/env.sh

python llm_sft.py \
    --model_type smollm2-135m-instruct \
    --sft_type full \
    --dataset sql-demo \
    --train_dataset_sample -1 \
    --batch_size 4 \
    --gradient_accumulation_steps 4 \
    -- "$@"
