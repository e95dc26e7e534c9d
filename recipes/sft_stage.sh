#!/usr/bin/env bash
# The papers' SFT stage: a teacher writes solutions with steps, the right ones are kept, and a base model is trained on them. The
# result is a model like the Step-DPO authors' Qwen2-7B-SFT. Use it in step_dpo_qwen2_7b.sh with MODEL=runs/sft/model
# TEMPLATE=data/templates/alpaca.jinja OPENING=$'Let\'s think step by step.\nStep 1:', as it was trained and is evaluated here. The
# authors evaluate theirs with "### Response: Let's think step by step." on one line (docs/evaluation.md), which this one never saw.
#
# Hardware   8 GPUs with 80 GB. Run here only as a test, 2 minutes on two cores:
#              TEACHER=data/tiny/model MODEL=data/tiny/model DATA=data/tiny/train.jsonl TEST=data/tiny/test.jsonl LIMIT=60 \
#                LAUNCH= SERVE= HF_HUB_OFFLINE=1 OUT=runs/sft_tiny bash recipes/sft_stage.sh
#            240 samples, 161 right, 50 of these distinct, 3 steps. The bundled model does not know Alpaca's prompt, and three
#            steps do not teach it: 1 of 60 problems before and after.
# Hours      about 2, estimated, not measured: 60,000 samples of 300 tokens at 20,000 tokens a second, 0.3 h; 3 epochs over some
#            50,000 right ones, 0.7 h; evaluation of two models, 0.5 h
# Disk       125 GB, not measured: one checkpoint with optimizer state is 92 GB, and --save-steps 400 of some 590 steps writes one
# Paper      374,000 solutions of MetaMath's and MMIQC's problems by DeepSeekMath, 299,000 of them for SFT; learning rate 5e-6, batch
#            256, 3 epochs (2 above 30B), linear decay, warm-up 0.03. Here: GSM8K and MATH, 4 samples a problem; DATA takes other files
# Published  Qwen2-7B-SFT: MATH 54.8, GSM8K 88.2
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${VIRTUAL_ENV:-}" ] || [ ! -d .venv ] || export PATH="$PWD/.venv/bin:$PATH"
# INT, TERM or a hangup to this script alone ends the running stage too, and so the engine in it
job=; run() { set -m; "$@" & job=$!; set +m; wait $job; }
trap 'kill -TERM -- -$job 2>/dev/null || true; wait; exit 130' INT TERM HUP
TEACHER=${TEACHER:-deepseek-ai/deepseek-math-7b-rl} MODEL=${MODEL:-Qwen/Qwen2-7B} OUT=${OUT:-runs/sft} DATA=${DATA:-}
TEST=${TEST:-} TEMPLATE=${TEMPLATE:-data/templates/alpaca.jinja} GPUS=${GPUS:-8} LIMIT=${LIMIT:-}
LAUNCH=${LAUNCH---config_file configs/fsdp2.yaml --num_processes $GPUS}
SERVE=${SERVE---engine-args=--data-parallel-size $GPUS --max-model-len 4096}
[ -n "$DATA" ] && [ -n "$TEST" ] || run python data/download.py gsm8k math
DATA=${DATA:-data/gsm8k_train.jsonl data/math_train.jsonl} TEST=${TEST:-data/gsm8k_test.jsonl data/math_test.jsonl}
run python 01_sample_errors.py --data $DATA --model "$TEACHER" --n 4 ${LIMIT:+--limit $LIMIT} --out "$OUT/samples.jsonl" ${SERVE:+"$SERVE"}
run accelerate launch $LAUNCH 04_train_stepdpo.py --objective sft --data "$OUT/samples.jsonl" --model "$MODEL" \
  --chat-template "$TEMPLATE" --lr 5e-6 --epochs 3 --batch-size 256 --schedule linear --warmup 0.03 --max-length 2048 \
  --gradient-checkpointing --tokens-per-batch 8192 --save-steps 400 --keep 1 --out "$OUT/model"
run python analysis/plot_training.py "$OUT/model"
run python 05_eval.py --data $TEST ${LIMIT:+--limit $LIMIT} --models "base=$MODEL" "SFT=$OUT/model" \
  --chat-template "$TEMPLATE" --out "$OUT/results" ${SERVE:+"$SERVE"}
run python analysis/regrade.py "$OUT/results" --verdict paper  # adds the verdicts of the papers' own code
run python analysis/report.py "$OUT/results"  # pictures and a page
