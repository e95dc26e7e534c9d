#!/usr/bin/env bash
# DPO, SCDPO, Step-DPO and Step-DPO with another model's steps, compared on the bundled world
# (docs/comparison.md): with equal numbers of pairs, and with equal numbers of trained tokens.
# Settings are chosen from the same grid on validation.jsonl.
#   bash experiments/ablation_tiny.sh              # five seeds; under two hours on two cores
#   bash experiments/ablation_tiny.sh --quick      # one seed, fewer problems, no grid; under 20 minutes
#   SEEDS="0 1" bash experiments/ablation_tiny.sh  # fewer seeds
#   WORLD=runs/code MANNER="--split blocks --opening=" METHODS="dpo scdpo step-dpo" OUT=runs/ablation_code SEEDS="0 1 2" \
#     bash experiments/ablation_tiny.sh            # code-integrated solutions (docs/code.md); SANDBOX=--unsafe-no-sandbox
# The same command resumes after a stop; what exists is not made again. FROM=FOLDER takes the pairs of another run, for other
# PAIRS, GRID or TRAIN: OUT=runs/ablation_128 FROM=runs/ablation TRAIN="--batch-size 128" bash experiments/ablation_tiny.sh
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --quick ]; then
  OUT=${OUT:-runs/ablation_quick} SEEDS=${SEEDS:-0} PROBLEMS=${PROBLEMS:-800} TEST=${TEST:-500} PAIRS=${PAIRS:-250} GRID=${GRID:-3e-5:1} FOREIGN=${FOREIGN:-1}
elif [ $# -gt 0 ]; then
  sed -n '2,11p' "$0" >&2; exit 2
fi
OUT=${OUT:-runs/ablation} SEEDS=${SEEDS:-0 1 2 3 4} PROBLEMS=${PROBLEMS:-2000} TEST=${TEST:-1000} PAIRS=${PAIRS:-400}
GRID=${GRID:-1e-5:1 3e-5:1 1e-4:1 3e-4:1 3e-5:0.4}  # learning rate : beta
METHODS=${METHODS:-dpo scdpo step-dpo step-dpo-ood dpo-tokens scdpo-tokens}
WORLD=${WORLD:-data/tiny} MANNER=${MANNER:-} TRAIN=${TRAIN:-} HEAT=${HEAT:-1.1 0.05 1.4} FROM=${FROM:-} FOREIGN=${FOREIGN:-2}  # epochs of the other model
JOBS=${JOBS:-2}  # trainings and evaluations side by side, a core each: such a small model does not fill two
export OPENAI_API_KEY=${OPENAI_API_KEY:-$RANDOM$RANDOM$RANDOM$RANDOM}
BASE=$WORLD/model
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-4}
[ -n "${VIRTUAL_ENV:-}" ] || [ ! -d .venv ] || export PATH="$PWD/.venv/bin:$PATH"
engine="--engine-args=--max-num-seqs 512 --max-model-len 1024"
ask=($MANNER --max-tokens 400 "$engine")
of_base=("${ask[@]}" --model "$BASE" ${BASE_URL:+--base-url "$BASE_URL"})  # BASE_URL: a server that has the base already
mkdir -p "$OUT"/{pairs,models,grid,logs}
exec 9>"$OUT/.lock"  # what a killed run left at work holds it too
if command -v flock >/dev/null && ! flock -n 9; then
  echo "another run, or what a killed one left behind, is still at work in $OUT; try again in two minutes" >&2; exit 2
fi
settings="$WORLD${MANNER:+ $MANNER}, $PROBLEMS problems, $PAIRS pairs, $TEST test problems, heat $HEAT, other model $FOREIGN epochs, training ${TRAIN:-as it is}, from ${FROM:-the start}"
[ -f "$OUT/settings" ] || echo "$settings" >"$OUT/settings"
if [ "$(cat "$OUT/settings")" != "$settings" ]; then
  echo "$OUT was made with: $(cat "$OUT/settings"); now it would be: $settings. Give another OUT" >&2; exit 2
fi
began=$SECONDS
say() { printf '%5d s  %s\n' $((SECONDS - began)) "$*"; }

trap 'trap "" INT TERM; kill $(jobs -p) 2>/dev/null || true' EXIT  # what runs, and what the pool runs
quiet() {  # quiet NAME COMMAND ...: its output goes to a log, its last line here
  local log="$OUT/logs/$1.log"; shift
  "$@" >"$log" 2>&1 & wait $! || { tail -3 "$log" >&2; exit 2; }
  say "$(grep -v '^$' "$log" | tail -1 | cut -c1-200)"
}
served() {  # served MODEL COMMAND ...: where MANNER has code blocks, with a server of this model that runs them
  [[ $MANNER == *blocks* && " $* " != *" --base-url "* ]] || { shift; exec "$@"; }
  trap 'trap "" INT TERM; kill $(jobs -p) 2>/dev/null || true; wait' EXIT
  local ready="$OUT/logs/server-$BASHPID" server; : >"$ready"
  python serving/code_server.py --model "$1" --port 0 "$engine" ${SANDBOX:-} >"$ready" & server=$!
  until grep -q ^ready "$ready"; do kill -0 $server 2>/dev/null || exit 2; sleep 1; done
  shift; "$@" --base-url "$(sed -n 's/^ready: --base-url //p' "$ready")" & wait $!
}
pool() {  # pool COMMAND ...: in the background as soon as fewer than JOBS run, a core each
  while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n || exit 2; done
  (
    trap 'trap "" INT TERM; kill $(jobs -p) 2>/dev/null || true' EXIT
    [ "$JOBS" = 1 ] || export OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CPU_KVCACHE_SPACE=2
    "$@"
  ) &
}
drain() {  # drain FILE ...: wait for all jobs; these files tell that they are done
  while [ -n "$(jobs -p)" ]; do wait -n || exit 2; done
  local file; for file; do [ -f "$file" ] || { echo "$file is missing: its job was killed; run the same command to resume" >&2; exit 2; }; done
}

ready() {  # the pairs of all METHODS are there
  [ -f "$OUT/pairs/ready" ] || return 1
  local method; for method in $METHODS; do [ -f "$OUT/pairs/$method.jsonl" ] || return 1; done
}

# --- pairs -----------------------------------------------------------------------------------------------------------
if ! ready && [ -n "$FROM" ]; then
  cp "$FROM"/all-*.jsonl "$OUT"
elif ! ready; then
  quiet 01 served "$BASE" python 01_sample_errors.py --data "$WORLD/train.jsonl" --limit "$PROBLEMS" --n 4 --out "$OUT/samples.jsonl" "${of_base[@]}"
  if [[ " $METHODS " == *step* || $METHODS == *tokens* ]]; then  # equal tokens: as many as Step-DPO has
    quiet 02 served "$BASE" python 02_locate_step.py --samples "$OUT/samples.jsonl" --max-per-problem 1 --out "$OUT/located.jsonl" \
      --keep-rollouts "$OUT/rollouts.jsonl" "${of_base[@]}"
    quiet 03-step-dpo served "$BASE" python 03_rectify.py --located "$OUT/located.jsonl" --rollouts "$OUT/rollouts.jsonl" --n 8 \
      --max-pairs-per-error 1 --out "$OUT/all-step-dpo.jsonl" "${of_base[@]}"
  fi
  quiet 03-dpo python 03_rectify.py --method dpo --samples "$OUT/samples.jsonl" $MANNER --out "$OUT/all-dpo.jsonl"
  quiet 03-scdpo served "$BASE" python 03_rectify.py --method scdpo --samples "$OUT/samples.jsonl" --heat $HEAT --out "$OUT/all-scdpo.jsonl" "${of_base[@]}"
  if [[ " $METHODS " == *ood* ]]; then  # another model: the base taught to solve the same problems in other words
    quiet foreign-text python experiments/foreign_solutions.py "$WORLD/train.jsonl" "$OUT/foreign.jsonl"
    quiet foreign python 04_train_stepdpo.py --objective sft --data "$OUT/foreign.jsonl" \
      --model "$BASE" --out "$OUT/foreign" --lr 1e-3 --epochs "$FOREIGN" --batch-size 64 --keep 0 --log-steps 20
    quiet 03-ood served "$OUT/foreign" python 03_rectify.py --located "$OUT/located.jsonl" --rectifier "$OUT/foreign" --n 8 --max-pairs-per-error 1 \
      --out "$OUT/all-step-dpo-ood.jsonl" "${ask[@]}"
  fi
fi
if ! ready; then
  quiet sizes python experiments/same_size.py "$OUT" --pairs "$PAIRS" --model "$BASE"
  touch "$OUT/pairs/ready"
fi

# --- settings, by the same grid for every method, seed 0, greedy accuracy on validation.jsonl ------------------------------
train() {  # train METHOD LR BETA SEED FOLDER
  local pairs="$OUT/pairs/$1"
  [ -f "$5/training.json" ] || quiet "train-$1-$2-$3-$4" python 04_train_stepdpo.py --data "$pairs.jsonl" --model "$BASE" \
    --out "$5" --lr "$2" --beta "$3" --epochs 2 --batch-size 32 --validation "$pairs.validation.jsonl" --eval-steps 6 \
    --log-steps 3 --keep 0 --seed "$4" $TRAIN
}
evaluate() {  # evaluate LABEL MODEL DATA LIMIT FOLDER [OPTIONS]
  local label=$1 model=$2 data=$3 limit=$4 folder=$5; shift 5
  quiet "eval-$(basename "$folder")-$label-$(basename "$model")" served "$model" python 05_eval.py --data "$data" --limit "$limit" \
    --models "$label=$model" "${ask[@]}" --out "$folder" "$@"
}
try() {  # try METHOD LR BETA FOLDER
  train "$1" "$2" "$3" 0 "$4"
  evaluate "$1-$2:$3" "$4" "$WORLD/validation.jsonl" 500 "$OUT/grid/results/$(basename "$4")"
  touch "$4.done"
}
made=()
for method in $METHODS; do
  for setting in $GRID; do
    folder="$OUT/grid/${method}_${setting/:/_}"
    [ "$(wc -w <<<"$GRID")" -gt 1 ] || break  # nothing to choose
    [ -f "$folder.done" ] || pool try "$method" "${setting%:*}" "${setting#*:}" "$folder"
    made+=("$folder.done")
  done
done
drain "${made[@]}"
python experiments/ablation_table.py "$OUT" --choose --methods $METHODS --grid $GRID

# --- models, and both evaluations of each -------------------------------------------------------------------------------
both() {  # both LABEL MODEL DONE [OPTIONS]: greedy, and at temperature 1
  local label=$1 model=$2 done=$3; shift 3
  evaluate "$label" "$model" "$WORLD/test.jsonl" "$TEST" "$OUT/greedy" "$@"
  evaluate "$label" "$model" "$WORLD/test.jsonl" "$TEST" "$OUT/temperature1" --temperature 1 "$@"
  touch "$done"
}
one() {  # one METHOD LR BETA SEED MODEL
  local grid="$OUT/grid/$1_$2_$3"
  if [ "$4" = 0 ] && [ -f "$grid.done" ] && [ ! -d "$5" ]; then  # seed 0 is the grid's
    rm -rf "$5.part" && cp -r "$grid" "$5.part" && mv "$5.part" "$5"
  fi
  train "$1" "$2" "$3" "$4" "$5"
  both "$1" "$5" "$5.done"
}
made=("$OUT/models/base.done")
[ -f "${made[0]}" ] || pool both base "$BASE" "${made[0]}" ${BASE_URL:+--base-url "$BASE_URL"}
declare -A group=([base]=$BASE)
for seed in $SEEDS; do  # a seed of all methods before the next seed, so that a run cut short can be compared
  for method in $METHODS; do
    read -r lr beta <"$OUT/grid/$method.chosen"
    model="$OUT/models/${method}_${lr}_$beta-$seed"
    [ -f "$model.done" ] || pool one "$method" "$lr" "$beta" "$seed" "$model"
    made+=("$model.done") group[$method]=${group[$method]:+${group[$method]},}$model
  done
done
drain "${made[@]}"

# --- one table ------------------------------------------------------------------------------------------------------------
named=() first=()
for method in base $METHODS; do named+=("$method=${group[$method]}") first+=("${group[$method]%%,*}"); done
ask+=(--data "$WORLD/test.jsonl" --limit "$TEST")  # all responses are there: no engine starts
quiet report-greedy python 05_eval.py --models "${named[@]}" "${ask[@]}" --out "$OUT/greedy"
quiet report-temperature1 python 05_eval.py --models "${named[@]}" "${ask[@]}" --out "$OUT/temperature1" --temperature 1
quiet page python analysis/report.py "$OUT/greedy"
[ -z "$MANNER" ] && quiet labels python experiments/true_errors.py "$OUT"/greedy/test/*-model.jsonl "$OUT/labelled.jsonl"  # the base's
[ -z "$MANNER" ] && quiet credit python analysis/credit.py "$OUT/labelled.jsonl" --models "${first[@]}" --beta 1 --show 10 --out "$OUT/credit"
python experiments/ablation_table.py "$OUT" --methods $METHODS --grid $GRID
say "all done: $OUT/table.md, $OUT/ablation.png, $OUT/greedy/report.html, $OUT/credit/credit.html"
