#!/usr/bin/env bash
# Step-Controlled DPO for a 7B SFT model (arXiv 2407.00782), chain-of-thought: naive pairs and step-controlled pairs mixed.
#
# Hardware   8 GPUs with 80 GB. Run here only as a test, on the bundled world in MetaMath's format (figures: docs/code.md):
#              python data/tiny/make.py --format lines --start data/tiny/model --steps 80 --lr 1e-3 --out runs/lines \
#                --work runs/lines/work
#              MODEL=runs/lines/model DATA=runs/lines/train.jsonl TEST=runs/lines/test.jsonl LIMIT=100 LAUNCH= SERVE= \
#                HF_HUB_OFFLINE=1 LR=1e-5 OUT=runs/scdpo_lines bash recipes/scdpo_mistral_7b.sh
# Hours      about 4, estimated, not measured. Sampling takes most: until a problem has a right and a wrong solution, up to 100
#            samples of the hardest of 14,973 problems (some 150 M tokens, 2 h). Step-controlled pairs, from at most two right
#            solutions of a problem (in the paper 13 K naive and 17 K step-controlled pairs): 30 M tokens. Training, 2 epochs: 1 h
# Disk       200 GB: a checkpoint with optimizer state is 87 GB, and the next one is complete before the last one is deleted
# Published  MetaMath-Mistral-7B: SFT 77.7 on GSM8K and 28.2 on MATH; DPO 81.0, 28.7; DPO with equal data 81.4, 29.0; SCDPO 81.7, 29.3.
#            Mistral-7B-Ours and MathCoder-Mistral-7B are code-integrated: scdpo_mistral_7b_code.sh
# Format     MetaMath writes no "Step 2:". Its prompt ends in "### Response: Let's think step by step.", a step is a line, and the
#            answer follows "The answer is:".
# Where paper and code differ
#   data     MetaMath's was not released; what follows is about the code-integrated models
#   heat     paper: 1.1, rising by 0.05 a step to 1.4. Code: 1.1 + 0.1 to 1.4, but for MATH 1.0 + 0.05 to 1.3 (MathCoder) or 1.2
#            (InternLM): HEAT="1.1 0.1 1.4"
#   step k   paper: drawn from 1 to m-1 of m steps of one right solution; here of at most two. Code: the first right solution of a
#            problem and every k from 1: SOLUTIONS=1 EVERY=--every-step
#   tries    paper: until an answer is wrong. Here at most TRIES, because some problems have no wrong answer to find
#   beta     paper: 0.1, for MetaMath (the model here) 0.5. Code: 0.1 for MetaMath's naive DPO
#   length   paper, and here: 2,048 tokens and 64 pairs a step. Its configuration: 1,024, and 16 on four GPUs
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${VIRTUAL_ENV:-}" ] || [ ! -d .venv ] || export PATH="$PWD/.venv/bin:$PATH"
# INT, TERM or a hangup to this script alone ends the running stage too, and so the engine in it
job=; run() { set -m; "$@" & job=$!; set +m; wait $job; }
trap 'kill -TERM -- -$job 2>/dev/null || true; wait; exit 130' INT TERM HUP
MODEL=${MODEL:-meta-math/MetaMath-Mistral-7B} OUT=${OUT:-runs/scdpo_7b} BETA=${BETA:-0.5} HEAT=${HEAT:-1.1 0.05 1.4}
SOLUTIONS=${SOLUTIONS:-2} EVERY=${EVERY:-}
DATA=${DATA:-} TEST=${TEST:-} LIMIT=${LIMIT:-} TRIES=${TRIES:-8} LR=${LR:-1e-7} SPLIT=${SPLIT:-lines} GPUS=${GPUS:-8}
LAUNCH=${LAUNCH---config_file configs/fsdp2.yaml --num_processes $GPUS}
SERVE=${SERVE---engine-args=--data-parallel-size $GPUS --max-model-len 4096}
[ -n "${OPENING+set}" ] || OPENING=" Let's think step by step."
manner=(--chat-template "${TEMPLATE:-data/templates/metamath.jinja}" --opening "$OPENING")
[ -n "$DATA" ] && [ -n "$TEST" ] || run python data/download.py gsm8k math
DATA=${DATA:-data/gsm8k_train.jsonl data/math_train.jsonl} TEST=${TEST:-data/gsm8k_test.jsonl data/math_test.jsonl}
run python 01_sample_errors.py --data $DATA --model "$MODEL" "${manner[@]}" --split "$SPLIT" --temperature 1 --top-p 1 --n 4 \
  --until-both 100 ${LIMIT:+--limit $LIMIT} --out "$OUT/samples.jsonl" ${SERVE:+"$SERVE"}
run python 03_rectify.py --method dpo --samples "$OUT/samples.jsonl" "${manner[@]}" --split "$SPLIT" --out "$OUT/naive.jsonl"
run python 03_rectify.py --method scdpo --samples "$OUT/samples.jsonl" --model "$MODEL" "${manner[@]}" --split "$SPLIT" \
  --heat $HEAT --tries "$TRIES" --solutions-per-problem "$SOLUTIONS" $EVERY --out "$OUT/controlled.jsonl" ${SERVE:+"$SERVE"}
run accelerate launch $LAUNCH 04_train_stepdpo.py --model "$MODEL" "${manner[@]:0:2}" --data "$OUT/naive.jsonl" \
  "$OUT/controlled.jsonl" --lr "$LR" --beta "$BETA" --epochs 2 --batch-size 64 --max-length 2048 --gradient-checkpointing --tokens-per-batch 8192 \
  --out "$OUT/model" --save-steps 300 --keep 1
run python analysis/plot_training.py "$OUT/model"
run python 05_eval.py --data $TEST ${LIMIT:+--limit $LIMIT} --models "base=$MODEL" "SCDPO=$OUT/model" "${manner[@]}" \
  --out "$OUT/results" ${SERVE:+"$SERVE"}
run python analysis/regrade.py "$OUT/results" --verdict scdpo  # adds other verdicts; theirs for MetaMath is not released
run python analysis/report.py "$OUT/results"  # pictures and a page
