#!/usr/bin/env bash
# Several rounds of Step-DPO: each round's model samples, locates and rectifies its own errors, and is the next one's reference.
# The papers make one round. Defaults are for the bundled world; run here with two rounds of 60 problems only, and not timed.
#   bash recipes/iterate.sh                                   # three rounds, other problems in each
#   MODEL=Qwen/Qwen2-7B-Instruct DATA="gsm8k math" LR=5e-7 BETA=0.4 EPOCHS=8 BATCH=128 TOKENS=2048 TEST="gsm8k math" \
#       LAUNCH="--config_file configs/fsdp2.yaml --num_processes 8" SERVE="--engine-args=--max-model-len 4096" bash recipes/iterate.sh
# LAUNCH goes to accelerate, TRAIN to 04. The same command goes on after a stop.
set -euo pipefail
cd "$(dirname "$0")/.."
# INT or TERM to this script alone ends the running stage too, and so the engine in it
job=; run() { set -m; "$@" & job=$!; set +m; wait $job; }
trap 'kill -TERM -- -$job 2>/dev/null; wait; exit 130' INT TERM
export PATH="$PWD/.venv/bin:$PATH"
ROUNDS=${ROUNDS:-3} OUT=${OUT:-runs/iterate} MODEL=${MODEL:-data/tiny/model} DATA=${DATA:-data/tiny/train.jsonl} PROBLEMS=${PROBLEMS:-1200}
LR=${LR:-3e-5} BETA=${BETA:-1} EPOCHS=${EPOCHS:-2} BATCH=${BATCH:-32} TOKENS=${TOKENS:-400} TEST=${TEST:-data/tiny/test.jsonl}
LAUNCH=${LAUNCH:-} TRAIN=${TRAIN:-}
SERVE=${SERVE:---engine-args=--max-num-seqs 512 --max-model-len 1024}
[ "$MODEL" != data/tiny/model ] || export HF_HUB_OFFLINE=1
policy=$MODEL models=("base=$MODEL")
for round in $(seq "$ROUNDS"); do
  here=$OUT/round-$round data=$DATA
  mkdir -p "$here"
  if [ -f "$DATA" ]; then  # a file: the next so many of its problems, so that no round learns from problems it has seen
    data=$here/problems.jsonl
    sed -n "$(((round - 1) * PROBLEMS + 1)),$((round * PROBLEMS))p" "$DATA" >"$data"
  fi
  run python 01_sample_errors.py --data $data --model "$policy" --max-tokens "$TOKENS" --out "$here/samples.jsonl" "$SERVE"
  run python 02_locate_step.py --samples "$here/samples.jsonl" --model "$policy" --max-tokens "$TOKENS" --out "$here/located.jsonl" \
    --keep-rollouts "$here/rollouts.jsonl" "$SERVE"
  run python 03_rectify.py --located "$here/located.jsonl" --rollouts "$here/rollouts.jsonl" --n 8 --model "$policy" \
    --max-tokens "$TOKENS" --out "$here/pairs.jsonl" "$SERVE"
  if [ ! -f "$here/trained" ]; then  # not again after a stop: other last bits would make it another policy to the next round
    run accelerate launch $LAUNCH 04_train_stepdpo.py --data "$here/pairs.jsonl" --model "$policy" --lr "$LR" --beta "$BETA" \
      --epochs "$EPOCHS" --batch-size "$BATCH" --keep 0 --out "$here/model" $TRAIN
    touch "$here/trained"
  fi
  policy=$here/model models+=("round-$round=$policy")
done
run python 05_eval.py --data $TEST --models "${models[@]}" --max-tokens "$TOKENS" --out "$OUT/results" "$SERVE"
