#!/usr/bin/env bash
# The papers' comparison on a small real model: Step-DPO, DPO, SFT on right samples and SCDPO, from the same samples of GSM8K's
# training part, with equal numbers of pairs (SFT: solutions). Each method has the best of three learning rates, by 500 other
# training problems. Test: GSM8K's test part and 500 problems of MATH, with intervals, paired tests and Holm's correction.
#   MODEL=Qwen/Qwen2.5-0.5B-Instruct bash recipes/small_model.sh
#   bash recipes/small_model.sh data | train METHOD RATE SEED | validate METHOD RATE SEED | choose | test | table
# Without an argument: all parts, one method after the other, with a test and a table after each. Each part can be run alone, and
# trainings and validations at the same time if the GPU has the memory (validate base: the base's accuracy there). The same
# command resumes after a stop; what exists is not made again.
#
# Hardware   one GPU, or two cores and 24 GB
# Hours      measured on two AVX2 cores in fp32, 183 problems and 161 pairs a method (docs/real_model.md): 02 0.8, 03 1.0, Step-DPO's
#            training 0.3, DPO's 0.7, SCDPO's 0.6, SFT's 0.4, GSM8K's test part 1.1 a model, 250 problems of MATH 0.4. A GPU and the
#            defaults below: not measured
# Memory     18 to 21 GB in 04, 10 GB in vLLM, there
# Disk       1 GB a trained model, there; 12 GB more while one is trained, for two checkpoints (computed)
#
# DATA       folder with gsm8k_train.jsonl, gsm8k_test.jsonl and math_test.jsonl; without it data/download.py makes them in data/
# SAMPLES    file of 01 to use instead of PROBLEMS x N new samples, of MODEL and GSM8K's training part; its rows of the VALIDATION
#            problems are left out
# PROBLEMS   750 of GSM8K's training part. The first VALIDATION (500), by a hash of the id, are for choosing the rate, so more
#            PROBLEMS take none of these. N samples of each, at temperature 0.7, top-p 1, at most TOKENS (512)
# LOCATE     options of 02 (default: its own defaults). 03 samples RECTIFY (8) continuations from the last right step
# PAIRS      at most 400 of each method; all have as many as the smallest set; half of SCDPO's are DPO's (the paper's naive pairs).
#            Step-DPO has PER_ERROR pairs (1) of an error, DPO and SCDPO's controlled half PER_PROBLEM (3) of a problem, so that no set
#            comes from a few problems; SFT has all right samples that differ. A tenth of the problems is held out, for the curves.
#            METHODS may include dpo-tokens and scdpo-tokens: as many tokens as Step-DPO's pairs
# RATES      1e-6 3e-6 1e-5; for SFT SFT_RATES, 5e-6 1e-5 2e-5. The papers' 5e-7 and 1e-7 are for 7B and 170 to 675 steps. Here 400 pairs,
#            BATCH 32 and EPOCHS 2 make 26 steps, so the rate must be higher. The first of SEEDS (0) chooses, the others use its rate.
#            A single rate is used without validation
# BETA       0.4 for all methods, so that they differ only in their pairs. Step-DPO's paper has 0.4 for 7B; SCDPO's has 0.5 for
#            MetaMath, whose solutions are text as here, and 0.1 for solutions with code
# BASE_URL   a server that has MODEL and, under their folders' names (OUT/models/METHOD-RATE-SEED), the tuned models; CONCURRENCY requests
# TEST_TOKENS  1024: longest answer in validation and test, greedy. GSM8K_TEST and MATH_TEST: numbers of problems (all; 500)
# ENGINE     options of vLLM in the process. TRAIN: options of 04 (--tokens-per-batch 2048: its default, 16,384, does not fit 24 GB)
set -euo pipefail
cd "$(dirname "$0")/.."
# INT, TERM or a hangup to this script alone ends the running stage too, and so the engine in it
job=; run() { printf '\n== %s\n' "$*"; set -m; "$@" & job=$!; set +m; wait $job; }
trap 'kill -TERM -- -$job 2>/dev/null || true; wait; exit 130' INT TERM HUP
[ -n "${VIRTUAL_ENV:-}" ] || [ ! -d .venv ] || export PATH="$PWD/.venv/bin:$PATH"
export TOKENIZERS_PARALLELISM=false
MODEL=${MODEL:-Qwen/Qwen2.5-0.5B-Instruct} OUT=${OUT:-runs/small_model} DATA=${DATA:-} SEEDS=${SEEDS:-0}
METHODS=${METHODS:-step_dpo dpo sft scdpo} RATES=${RATES:-1e-6 3e-6 1e-5} SFT_RATES=${SFT_RATES:-5e-6 1e-5 2e-5}
PROBLEMS=${PROBLEMS:-750} N=${N:-4} TOKENS=${TOKENS:-512} LOCATE=${LOCATE:-} RECTIFY=${RECTIFY:-8}
SAMPLES=${SAMPLES:-} PAIRS=${PAIRS:-400} PER_ERROR=${PER_ERROR:-1} PER_PROBLEM=${PER_PROBLEM:-3} EPOCHS=${EPOCHS:-2} BATCH=${BATCH:-32} BETA=${BETA:-0.4}
VALIDATION=${VALIDATION:-500} GSM8K_TEST=${GSM8K_TEST:-1319} MATH_TEST=${MATH_TEST:-500} TEST_TOKENS=${TEST_TOKENS:-1024}
ENGINE=${ENGINE---engine-args=--max-model-len 2048} TRAIN=${TRAIN---tokens-per-batch 2048} BASE_URL=${BASE_URL:-} CONCURRENCY=${CONCURRENCY:-}
METHODS=${METHODS//_/-}
reach=(${ENGINE:+"$ENGINE"} ${BASE_URL:+--base-url "$BASE_URL"} ${CONCURRENCY:+--concurrency "$CONCURRENCY"})
ask=(--model "$MODEL" --temperature 0.7 --top-p 1 --max-tokens "$TOKENS" "${reach[@]}")
answer=(--max-tokens "$TEST_TOKENS" "${reach[@]}")
mkdir -p "$OUT"/{problems,pairs,models,validation}
settings="$MODEL, ${SAMPLES:-$PROBLEMS problems x $N}, $TOKENS tokens, $LOCATE, $RECTIFY rectifications, $PAIRS pairs, $PER_ERROR an error, \
$PER_PROBLEM a problem, $EPOCHS epochs, batch $BATCH, beta $BETA, $VALIDATION to validate, $GSM8K_TEST and $MATH_TEST to test, \
$TEST_TOKENS tokens, training ${TRAIN:-as it is}"
[ -f "$OUT/settings" ] || echo "$settings" >"$OUT/settings"
if [ "$(cat "$OUT/settings")" != "$settings" ]; then
  echo "$OUT was made with: $(cat "$OUT/settings"); now it would be: $settings. Give another OUT" >&2; exit 2
fi

rates() { [ "$1" = sft ] && echo "$SFT_RATES" || echo "$RATES"; }
data() {
  [ ! -f "$OUT/pairs/ready" ] || return 0
  [ -n "$DATA" ] || run python data/download.py gsm8k math
  run python experiments/small_model.py problems "$OUT" ${DATA:+--data "$DATA"} ${SAMPLES:+--samples "$SAMPLES" --model "$MODEL"} \
    --validation "$VALIDATION" --gsm8k "$GSM8K_TEST" --math "$MATH_TEST"
  [ -n "$SAMPLES" ] || run python 01_sample_errors.py --data "$OUT/problems/gsm8k_train.jsonl" --limit "$PROBLEMS" --n "$N" \
    --out "$OUT/samples.jsonl" "${ask[@]}"
  run python 02_locate_step.py --samples "$OUT/samples.jsonl" $LOCATE --out "$OUT/located.jsonl" --keep-rollouts "$OUT/rollouts.jsonl" "${ask[@]}"
  local kept=()
  [ ! -f "$OUT/rollouts.jsonl" ] || kept=(--rollouts "$OUT/rollouts.jsonl")  # a judge makes none
  run python 03_rectify.py --located "$OUT/located.jsonl" "${kept[@]}" --n "$RECTIFY" \
    --max-pairs-per-error "$PER_ERROR" --out "$OUT/all-step-dpo.jsonl" "${ask[@]}"
  run python 03_rectify.py --method dpo --samples "$OUT/samples.jsonl" --pairs-per-problem "$PER_PROBLEM" --out "$OUT/all-dpo.jsonl"
  run python 03_rectify.py --method scdpo --samples "$OUT/samples.jsonl" --solutions-per-problem "$PER_PROBLEM" --out "$OUT/all-scdpo.jsonl" \
    --model "$MODEL" --max-tokens "$TOKENS" "${reach[@]}"
  run python experiments/same_size.py "$OUT" --pairs "$PAIRS" --model "$MODEL" --sft
  touch "$OUT/pairs/ready"
}
train() {  # train METHOD RATE SEED
  local pairs=$OUT/pairs/$1 how=(--beta "$BETA")
  [ "$1" != sft ] || how=(--objective sft --schedule linear --warmup 0.03)
  [ ! -s "$pairs.validation.jsonl" ] || how+=(--validation "$pairs.validation.jsonl")
  [ ! -f "$OUT/models/$1-$2-$3/training.json" ] || return 0
  run python 04_train_stepdpo.py --data "$pairs.jsonl" --model "$MODEL" --lr "$2" --seed "$3" --epochs "$EPOCHS" --batch-size "$BATCH" \
    --eval-steps 10 --save-steps 10 --keep 0 "${how[@]}" $TRAIN --out "$OUT/models/$1-$2-$3"
  run python analysis/plot_training.py "$OUT/models/$1-$2-$3"
}
validate() {  # validate METHOD RATE SEED, or validate base
  local name=${1}${2:+-$2-$3} model=$OUT/models/$1-${2:-}-${3:-}
  [ "$1" != base ] || model=$MODEL
  [ -f "$OUT/validation/$name/summary.json" ] || run python 05_eval.py --data "$OUT/problems/validation.jsonl" --models "$name=$model" \
    "${answer[@]}" --out "$OUT/validation/$name"
}
choose() {  # choose METHOD ...
  local method
  for method; do run python experiments/small_model.py choose "$OUT" --method "$method" --rates $(rates "$method") --seed "${SEEDS%% *}"; done
}
test_all() {  # base and what is trained at the chosen rates
  local method seed models named=("base=$MODEL")
  for method in $METHODS; do
    models=
    for seed in $SEEDS; do
      model=$OUT/models/$method-$(cat "$OUT/$method.rate" 2>/dev/null || true)-$seed
      [ ! -f "$model/training.json" ] || models=$models${models:+,}$model
    done
    [ -z "$models" ] || named+=("$method=$models")
  done
  run python 05_eval.py --data "$OUT"/problems/{gsm8k_test,math_test}.jsonl --models "${named[@]}" "${answer[@]}" --out "$OUT/test"
  run python analysis/report.py "$OUT/test"
}
table() { run python experiments/small_model.py table "$OUT" --model "$MODEL" --methods $METHODS; }

case "${1:-all}-$#" in
  all-0)
    data
    [[ "$RATES$SFT_RATES" != *\ * ]] || validate base
    for method in $METHODS; do
      for rate in $(rates "$method"); do
        train "$method" "$rate" "${SEEDS%% *}"
        [ "$(rates "$method")" = "$rate" ] || validate "$method" "$rate" "${SEEDS%% *}"
      done
      choose "$method"
      for seed in $SEEDS; do train "$method" "$(cat "$OUT/$method.rate")" "$seed"; done
      test_all
      table
    done ;;
  data-1) data ;;
  train-4 | validate-4) "$1" "${2//_/-}" "$3" "$4" ;;
  validate-2) validate base ;;
  choose-1) choose $METHODS ;;
  test-1) test_all ;;
  table-1) table ;;
  *) sed -n '2,9p' "$0" >&2; exit 2 ;;
esac
