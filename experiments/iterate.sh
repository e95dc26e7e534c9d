#!/usr/bin/env bash
# Rounds of preference optimization compared with cheaper controls. Each method has the same number of sampled and of trained tokens
# a round: DPO on right and wrong samples alone (DPO-VP), Step-DPO, SCDPO, and SFT on right samples (rejection sampling). The model
# of a round samples its own solutions to new problems, and is the next round's reference. The papers make one round.
#   bash experiments/iterate.sh                      # all four, three rounds, three seeds, on the bundled world
#   METHODS=step-dpo SEEDS=0 MODEL=Qwen/Qwen2-7B-Instruct DATA=data/gsm8k_train.jsonl PROBLEMS=800 BUDGET= TRAINED= LRS=5e-7 BETA=0.4 EPOCHS=8 \
#       BATCH=128 TOKENS=2048 TEST="data/gsm8k_test.jsonl data/math_test.jsonl" LIMIT=5000 JOBS=1 LAUNCH="--config_file configs/fsdp2.yaml --num_processes 8" \
#       TRAIN="--gradient-checkpointing --tokens-per-batch 8192" \
#       SERVE="--engine-args=--max-model-len 4096" bash experiments/iterate.sh     # one method on a real model
# BUDGET     sampled tokens of a round; its problems are cut to fit (at most three times PROBLEMS are sampled)
# TRAINED    tokens of chosen and rejected that a round trains on, by the number of epochs and by cutting
#            Each of the two may be empty: all there is, EPOCHS epochs
# LRS        learning rates to choose from, by round 1 of the first seed on VALIDATION
# LAUNCH, TRAIN  options of accelerate, and of 04
# The same command resumes after a stop. Results: docs/rounds.md.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${VIRTUAL_ENV:-}" ] || [ ! -d .venv ] || export PATH="$PWD/.venv/bin:$PATH"
METHODS=${METHODS:-dpo step-dpo scdpo sft} SEEDS=${SEEDS:-0 1 2} ROUNDS=${ROUNDS:-3} OUT=${OUT:-runs/iterate}
MODEL=${MODEL:-data/tiny/model} DATA=${DATA:-data/tiny/train.jsonl} PROBLEMS=${PROBLEMS:-200} BUDGET=${BUDGET-100000} TRAINED=${TRAINED-20000}
LRS=${LRS:-1e-5 3e-5 1e-4 3e-4} BETA=${BETA:-1} EPOCHS=${EPOCHS:-2} BATCH=${BATCH:-32} TOKENS=${TOKENS:-400} N=${N:-4}
TEST=${TEST:-data/tiny/test.jsonl} LIMIT=${LIMIT:-1000} VALIDATION=${VALIDATION:-data/tiny/validation.jsonl}
SERVE=${SERVE:---engine-args=--max-num-seqs 512 --max-model-len 1024} LAUNCH=${LAUNCH:-} TRAIN=${TRAIN:-} JOBS=${JOBS:-2}
[ "$MODEL" != data/tiny/model ] || export HF_HUB_OFFLINE=1
export TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT/logs" "$OUT/lr"
exec 9>"$OUT/.lock"  # what a killed run left at work holds it too
if command -v flock >/dev/null && ! flock -n 9; then
  echo "another run, or what a killed one left behind, is still at work in $OUT; try again in two minutes" >&2; exit 2
fi
settings="$MODEL, $DATA, $PROBLEMS problems, $N samples, budget ${BUDGET:-none}, trained ${TRAINED:-all}, $EPOCHS epochs, batch $BATCH, rates $LRS, \
beta $BETA, $TOKENS tokens, test $TEST $LIMIT, validation $VALIDATION, training ${TRAIN:-as it is}"
[ -f "$OUT/settings" ] || echo "$settings" >"$OUT/settings"
if [ "$(cat "$OUT/settings")" != "$settings" ]; then
  echo "$OUT was made with: $(cat "$OUT/settings"); now it would be: $settings. Give another OUT" >&2; exit 2
fi
needed=$((3 * PROBLEMS * ROUNDS))  # a round never sees the problems of another
if [ ! -f "$DATA" ] || [ "$(wc -l <"$DATA")" -lt $needed ]; then
  echo "DATA: one file with at least $needed problems, 3 x PROBLEMS x ROUNDS; give that, or fewer PROBLEMS" >&2; exit 2
fi
first_seed=${SEEDS%% *} began=$SECONDS
declare -A share=([step-dpo]=1 [scdpo]=2 [dpo]=2 [sft]=2)  # times PROBLEMS, to begin with: methods that only sample can afford more problems

# INT or TERM to this script alone ends the running stages too, and so the engines in them
job=; run() { set -m; "$@" & job=$!; set +m; wait $job; }
trap 'trap "" HUP INT TERM; kill -TERM $(jobs -p) 2>/dev/null || true; wait; exit 130' HUP INT TERM
pool() {  # pool COMMAND ...: in the background as soon as fewer than JOBS run, a core each
  while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n || fail; done
  (
    trap 'kill -TERM -- -$job 2>/dev/null || true; wait; exit 130' HUP INT TERM
    [ "$JOBS" = 1 ] || export OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CPU_KVCACHE_SPACE=2
    "$@"
  ) &
}
fail() { kill -TERM $(jobs -p) 2>/dev/null || true; wait || true; echo "a stage failed; its log is the newest of $OUT/logs" >&2; exit 2; }
drain() { while [ -n "$(jobs -p)" ]; do wait -n || fail; done; }
stage() {  # stage LOG COMMAND ...: the output goes to the log, its last line here
  local log=$1; shift
  run "$@" >>"$log" 2>&1 || { tail -3 "$log" >&2; exit 2; }
  printf '%5d s  %s\n' $((SECONDS - began)) "$(grep -v '^$' "$log" | tail -1 | cut -c1-180)"
}

sample() {  # sample METHOD SEED ROUND POLICY: solutions, pairs, and what of them is trained on, in OUT/METHOD/SEED/ROUND
  local here=$OUT/$1/$2/$3 log=$OUT/logs/$1-$2-$3.log data ask size=$((PROBLEMS * share[$1]))
  ask=(--model "$4" --max-tokens "$TOKENS" --seed "$2" "$SERVE")
  mkdir -p "$here"
  data=$here/problems.jsonl
  sed -n "$((($3 - 1) * PROBLEMS * 3 + 1)),$(($3 * PROBLEMS * 3))p" "$DATA" >"$data"
  while :; do
    stage "$log" python 01_sample_errors.py --data "$data" --limit $size --n "$N" --out "$here/samples.jsonl" "${ask[@]}"
    case $1 in
      step-dpo)
        stage "$log" python 02_locate_step.py --samples "$here/samples.jsonl" --max-per-problem 1 --out "$here/located.jsonl" \
          --keep-rollouts "$here/rollouts.jsonl" "${ask[@]}"
        stage "$log" python 03_rectify.py --located "$here/located.jsonl" --rollouts "$here/rollouts.jsonl" --n 8 \
          --out "$here/step-dpo.jsonl" "${ask[@]}" ;;
      scdpo)
        stage "$log" python 03_rectify.py --method scdpo --samples "$here/samples.jsonl" --out "$here/scdpo.jsonl" "${ask[@]}" ;;&
      dpo | scdpo)
        stage "$log" python 03_rectify.py --method dpo --samples "$here/samples.jsonl" --seed "$2" --out "$here/dpo.jsonl" ;;
    esac
    stage "$log" python experiments/rounds.py cut "$here" --method "$1" --model "$4" --seed "$2" --epochs "$EPOCHS" \
      ${BUDGET:+--budget "$BUDGET"} ${TRAINED:+--trained "$TRAINED"}
    [ ! -f "$here/epochs" ] || break
    size=$((size + PROBLEMS))  # a better policy has fewer errors to pay for: below the budget, on with more problems
    [ $size -le $((PROBLEMS * 3)) ] || { echo "$here: the budget is not reached with $((PROBLEMS * 3)) problems; give more PROBLEMS" >&2; exit 2; }
  done
}
train() {  # train METHOD SEED ROUND POLICY LR FOLDER
  local here=$OUT/$1/$2/$3 objective=
  [ "$1" != sft ] || objective="--objective sft"
  [ -f "$6/training.json" ] || stage "$OUT/logs/$1-$2-$3.log" accelerate launch $LAUNCH 04_train_stepdpo.py --data "$here/train.jsonl" --model "$4" \
    $objective --out "$6" --lr "$5" --beta "$BETA" --epochs "$(cat "$here/epochs")" --batch-size "$BATCH" --keep 0 --log-steps 5 \
    --seed "$2" $TRAIN
}
evaluate() {  # evaluate LABEL MODEL FOLDER DATA LIMIT
  stage "$OUT/logs/eval-$1.log" python 05_eval.py --data $4 --limit "$5" --models "$1=$2" --max-tokens "$TOKENS" --out "$3" "$SERVE"
}
choose() {  # choose METHOD: the learning rate with which round 1 of the first seed is best on VALIDATION
  [ -f "$OUT/$1/$first_seed/1/epochs" ] || sample "$1" "$first_seed" 1 "$MODEL"
  for lr in $LRS; do
    [ "$LRS" = "$lr" ] || [ -f "$OUT/lr/$1-$lr/summary.json" ] || {
      train "$1" "$first_seed" 1 "$MODEL" "$lr" "$OUT/lr/models/$1-$lr"
      evaluate "$1-$lr" "$OUT/lr/models/$1-$lr" "$OUT/lr/$1-$lr" "$VALIDATION" 500
    }
  done
  python experiments/rounds.py choose "$OUT" --method "$1" --rates $LRS
}
chain() {  # chain METHOD SEED: its rounds
  local policy=$MODEL round here
  for round in $(seq "$ROUNDS"); do
    here=$OUT/$1/$2/$round
    [ -f "$here/epochs" ] || sample "$1" "$2" "$round" "$policy"
    train "$1" "$2" "$round" "$policy" "$(cat "$OUT/lr/$1")" "$here/model"
    policy=$here/model
    [ -f "$here/evaluated" ] || evaluate "$1-$2-$round" "$policy" "$OUT/results" "$TEST" "$LIMIT"
    touch "$here/evaluated"
  done
}

[ -f "$OUT/base" ] || pool evaluate base "$MODEL" "$OUT/results" "$TEST" "$LIMIT"
for method in $METHODS; do pool choose "$method"; done
drain
touch "$OUT/base"
for seed in $SEEDS; do
  for method in $METHODS; do pool chain "$method" "$seed"; done
done
drain
named=("base=$MODEL")
for method in $METHODS; do
  for round in $(seq "$ROUNDS"); do
    group=$(for seed in $SEEDS; do printf ',%s' "$OUT/$method/$seed/$round/model"; done)
    named+=("$method-$round=${group#,}")
  done
done
stage "$OUT/logs/report.log" python 05_eval.py --data $TEST --limit "$LIMIT" --models "${named[@]}" --max-tokens "$TOKENS" --out "$OUT/results" "$SERVE"
stage "$OUT/logs/report.log" python analysis/report.py "$OUT/results"
python experiments/rounds.py table "$OUT" --methods $METHODS --rounds "$ROUNDS" --seeds $SEEDS
