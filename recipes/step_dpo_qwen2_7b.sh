#!/usr/bin/env bash
# Step-DPO for Qwen2-7B-Instruct with its own pairs, as in the paper (arXiv 2406.18629): the defaults of the scripts.
#
# Hardware   8 GPUs with 80 GB (training: an estimated 26 GB each, 16 bytes a parameter sharded by FSDP2). Not run here.
# Hours      about 3, estimated from tokens, not measured: sampling 9 M, locating 60 M, rectifying 40 M at 20,000 a second on 8
#            GPUs, 1.5 h; training 34 M tokens at 40 % of an A100's peak, 0.5 h; evaluation of two models on 6,736 problems, 0.5 h
#            Training is with the published 10,795 pairs; own pairs can be several times as many (03 --max-pairs-per-error limits them)
# Disk       220 GB; with the published pairs, whose run has one checkpoint, 125 GB. A checkpoint with optimizer state is 92 GB, and
#            a new one is complete before the old one is deleted
# GPUS       8; 4 need an estimated 42 GB each in training, 2 need 72 GB, and 1 needs TRAIN="--lora-rank 16"
# Published  Qwen2-7B-Instruct, the authors' prompt: MATH 53.0, GSM8K 85.5; after Step-DPO 58.6 and 87.9
# Where paper and code differ
#   beta            paper, and here: 0.4 for 7B. Its script: 0.5 (swapped for 72B): BETA=0.5
#   locating        paper: by hand or GPT-4. Code: GPT-4o. Here: the model's own continuations; LOCATOR="--locator judge
#                   --judge-model ... --judge-base-url ..."
#   EOS             code: never. Here: after a step that ends its solution; TRAIN=--no-eos
#   neutral steps   an error in the code, not in the text: --neutral correct within this LOCATOR
#   chosen steps    the paper describes a filter of wrong ones, which is not released: analysis/check_chosen.py
#   model           its script for 7B: xinlai/Qwen2-7B-SFT and Alpaca's prompt: MODEL=xinlai/Qwen2-7B-SFT
#                   DATA=xinlai/Math-Step-DPO-10K TRAIN="--chat-template data/templates/alpaca.jinja"
#                   TEMPLATE=data/templates/metamath.jinja OPENING=" Let's think step by step."
# TEMPLATE, OPENING: of the evaluation, if not the authors' for Qwen2-Instruct
# DATA=xinlai/Math-Step-DPO-10K trains on the published 10,795 pairs instead, and skips the first three stages
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${VIRTUAL_ENV:-}" ] || [ ! -d .venv ] || export PATH="$PWD/.venv/bin:$PATH"
# INT, TERM or a hangup to this script alone ends the running stage too, and so the engine in it
job=; run() { set -m; "$@" & job=$!; set +m; wait $job; }
trap 'kill -TERM -- -$job 2>/dev/null || true; wait; exit 130' INT TERM HUP
MODEL=${MODEL:-Qwen/Qwen2-7B-Instruct} OUT=${OUT:-runs/step_dpo_7b} BETA=${BETA:-0.4} DATA=${DATA:-}
GPUS=${GPUS:-8} LOCATOR=${LOCATOR:-}
SERVE="--engine-args=--data-parallel-size $GPUS --max-model-len 4096"
TEST=$(echo data/{gsm8k_test,math_test,odyssey_math,aime24}.jsonl)
run python data/download.py gsm8k math odyssey-math aime24
if [ -z "$DATA" ]; then
  run python 01_sample_errors.py --model "$MODEL" --out "$OUT/samples.jsonl" "$SERVE"
  run python 02_locate_step.py --samples "$OUT/samples.jsonl" --model "$MODEL" --out "$OUT/located.jsonl" \
    --keep-rollouts "$OUT/rollouts.jsonl" $LOCATOR "$SERVE"
  kept=()
  [ ! -f "$OUT/rollouts.jsonl" ] || kept=(--rollouts "$OUT/rollouts.jsonl")  # a judge makes none
  run python 03_rectify.py --located "$OUT/located.jsonl" "${kept[@]}" --model "$MODEL" --out "$OUT/pairs.jsonl" "$SERVE"
  DATA=$OUT/pairs.jsonl
fi
run accelerate launch --config_file configs/fsdp2.yaml --num_processes "$GPUS" 04_train_stepdpo.py --data "$DATA" --model "$MODEL" \
  --beta "$BETA" ${TRAIN:-} --gradient-checkpointing --tokens-per-batch 8192 --out "$OUT/model" --save-steps 400 --keep 1
run python analysis/plot_training.py "$OUT/model"
run python 05_eval.py --data $TEST --models "base=$MODEL" "Step-DPO=$OUT/model" \
  --chat-template "${TEMPLATE:-data/templates/step_dpo_qwen.jinja}" --opening "${OPENING-}" --out "$OUT/results" "$SERVE"
run python analysis/regrade.py "$OUT/results" --verdict paper  # adds the verdicts of the papers' own code
run python analysis/report.py "$OUT/results"  # pictures and a page
[ ! -f "$OUT/pairs.jsonl" ] || run python analysis/contamination.py "$OUT/pairs.jsonl" --data $TEST
