#!/usr/bin/env bash
# The five stages on the bundled model, then base and tuned model compared on the 2,000 test problems. `make quickstart` runs it.
#   SEEDS="0 1 2" make quickstart      # three trained models instead of one, from the same pairs
# Learning rate, beta and epochs were chosen on data/tiny/validation.jsonl (docs/world.md).
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${VIRTUAL_ENV:-}" ] || [ ! -d .venv ] || export PATH="$PWD/.venv/bin:$PATH"
OUT=${OUT:-runs/quickstart} SEEDS=${SEEDS:-0} PROBLEMS=${PROBLEMS:-1000} TEST_PROBLEMS=${TEST_PROBLEMS:-2000}
MODEL=data/tiny/model
mkdir -p "$OUT"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
times="" job=
# INT, TERM or a hangup to this script alone ends the running stage too, and so the engine in it
trap 'kill -TERM -- -$job 2>/dev/null || true; wait; exit 130' INT TERM HUP
stage() {  # stage NAME COMMAND ...: run it and remember its seconds
  local name=$1 start=$SECONDS; shift
  printf '\n== %s: %s\n' "$name" "$*"
  set -m; "$@" & job=$!; set +m
  wait $job
  times="$times$(printf '%-28s %4d s' "$name" $((SECONDS - start)))"$'\n'
}

MODEL_OPTIONS=(--model $MODEL --max-tokens 400 "--engine-args=--max-num-seqs 512 --max-model-len 1024")
stage "01 sample" python 01_sample_errors.py --data data/tiny/train.jsonl --limit "$PROBLEMS" --n 2 \
  --out "$OUT/samples.jsonl" "${MODEL_OPTIONS[@]}"
stage "02 locate" python 02_locate_step.py --samples "$OUT/samples.jsonl" --out "$OUT/located.jsonl" \
  --keep-rollouts "$OUT/rollouts.jsonl" "${MODEL_OPTIONS[@]}"
stage "03 rectify" python 03_rectify.py --located "$OUT/located.jsonl" --rollouts "$OUT/rollouts.jsonl" --n 8 \
  --out "$OUT/pairs.jsonl" "${MODEL_OPTIONS[@]}"

tuned=()
for seed in $SEEDS; do
  stage "04 train, seed $seed" python 04_train_stepdpo.py --data "$OUT/pairs.jsonl" --model $MODEL --out "$OUT/model-$seed" \
    --lr 3e-5 --beta 1 --epochs 2 --batch-size 32 --validation-fraction 0.05 --eval-steps 10 --log-steps 5 --keep 0 --seed "$seed"
  stage "picture, seed $seed" python analysis/plot_training.py "$OUT/model-$seed"
  tuned+=("$OUT/model-$seed")
done
stage "05 evaluate" python 05_eval.py --data data/tiny/test.jsonl --max-tokens 400 --limit "$TEST_PROBLEMS" \
  --models "base=$MODEL" "Step-DPO=$(IFS=,; echo "${tuned[*]}")" \
  --out "$OUT/results" --engine-args="--max-num-seqs 512 --max-model-len 1024"
stage "overlap of test and pairs" python analysis/contamination.py "$OUT/pairs.jsonl" --data data/tiny/test.jsonl --show 3
stage "pictures and page" python analysis/report.py "$OUT/results"
printf '\nWhere the time went:\n%s%-28s %4d s\n' "$times" all $SECONDS
echo "The whole report with pictures and responses: $OUT/results/report.html"
