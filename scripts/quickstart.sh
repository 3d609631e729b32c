#!/usr/bin/env bash
# From a new machine to a tuned model: installs, asks the base model, fine-tunes it, asks again, compares.
# Needs no network after the installation. Flags are passed to llm_sft.py, e.g. --num_train_epochs 2.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh
make_venv run requirements.txt

python=.venv/bin/python
out=output/quickstart
answers=(
    --do_sample false --max_new_tokens 40 --show_dataset_sample -1 --infer_batch_size 64
    --score tools/sql_score.py:right
)
# A hash of what the results depend on: for the same code and flags they are not computed again.
state=$({
    find utils tools -type f \( -name '*.py' -o -name '*.json' \) -print0 | LC_ALL=C sort -z | xargs -0 cat
    cat llm_*.py requirements.txt constraints.txt "${BASH_SOURCE[0]}"
    echo "$@"
} | sha256sum | cut -d' ' -f1)

if [[ "$(cat "$out/state" 2>/dev/null)" != "$state" ]]; then
    rm -rf "$out"
    mkdir -p "$out"
    echo '1/3 the base model answers the held-out questions'
    "$python" llm_infer.py --model_type smollm2-135m-instruct --dataset sql-demo "${answers[@]}" \
        --result_path "$out/before.jsonl" > "$out/before.txt"
    echo '2/3 fine-tuning'
    "$python" llm_sft.py --model_type smollm2-135m-instruct --dataset 'sql-demo#640' --train_dataset_sample -1 \
        --batch_size 8 --gradient_accumulation_steps 1 --eval_batch_size 16 --eval_steps 100 --learning_rate 2e-3 \
        --lora_rank 16 --lora_target_modules q_proj k_proj v_proj o_proj down_proj --output_dir "$out" -- "$@"
    checkpoint=$("$python" -c "import json, glob; print(json.load(open(glob.glob('$out/*/v0-*/run.json')[0]))['best_checkpoint'])")
    echo '3/3 the tuned model answers them'
    "$python" llm_infer.py --ckpt_dir "$checkpoint" "${answers[@]}" --result_path "$out/after.jsonl" > "$out/after.txt"
    echo "$state" > "$out/state"
fi
"$python" -m tools.quickstart_report "$out"
