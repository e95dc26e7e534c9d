#!/usr/bin/env bash
# The five stages on the bundled model: one vLLM server for 01 to 03, then training, then base against tuned model on
# the 2,000 test problems. `make quickstart` calls it; README has the minutes.
#   SEEDS="0 1 2" make quickstart      # three trained models instead of one, from the same pairs
# Learning rate, beta and epochs were chosen on data/tiny/validation.jsonl (docs/world.md).
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/quickstart} SEEDS=${SEEDS:-0} PROBLEMS=${PROBLEMS:-1000} TEST_PROBLEMS=${TEST_PROBLEMS:-2000}
MODEL=data/tiny/model
mkdir -p "$OUT"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-4}
times=""
stage() {  # stage NAME COMMAND ...: run it and remember its seconds
  local name=$1 start=$SECONDS; shift
  printf '\n== %s: %s\n' "$name" "$*"
  set -m; "$@" & job=$!; set +m
  wait $job
  times="$times$(printf '%-28s %4d s' "$name" $((SECONDS - start)))"$'\n'
}

# one server for three stages; the key is random and stays in the environment
export OPENAI_API_KEY=$(python -c 'import secrets; print(secrets.token_hex(16))')
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
cpu=$(python -c 'import importlib; print(*importlib.import_module("01_sample_errors").cpu_options())')
set -m  # a process group of its own, to be ended as one
VLLM_API_KEY=$OPENAI_API_KEY python -m vllm.entrypoints.openai.api_server --model $MODEL --host 127.0.0.1 --port "$port" \
  --max-num-seqs 512 --max-model-len 1024 --generation-config vllm --disable-uvicorn-access-log $cpu >"$OUT/server.log" 2>&1 &
server=$! job=
set +m
# what is at work goes along, also where INT or TERM comes to this script alone; `|| true`: the status stays the recipe's
trap 'for group in $server $job; do kill -TERM -- -$group 2>/dev/null || true; done; wait' EXIT
trap 'exit 130' INT TERM
wait_for_server() {
  for _ in $(seq 600); do
    python -c "import httpx, sys; sys.exit(not httpx.get('http://127.0.0.1:$port/health').is_success)" 2>/dev/null && return
    kill -0 $server 2>/dev/null || break
    sleep 1
  done
  echo "the server did not come up; see $OUT/server.log" >&2
  return 2
}
SERVER="--base-url http://127.0.0.1:$port/v1 --model $MODEL --max-tokens 400"
stage "server up" wait_for_server
stage "01 sample" python 01_sample_errors.py --data data/tiny/train.jsonl --limit "$PROBLEMS" --n 2 \
  --out "$OUT/samples.jsonl" $SERVER
stage "02 locate" python 02_locate_step.py --samples "$OUT/samples.jsonl" --out "$OUT/located.jsonl" \
  --keep-rollouts "$OUT/rollouts.jsonl" $SERVER
stage "03 rectify" python 03_rectify.py --located "$OUT/located.jsonl" --rollouts "$OUT/rollouts.jsonl" --n 8 \
  --out "$OUT/pairs.jsonl" $SERVER
kill -TERM -- -$server && wait $server 2>/dev/null || true

tuned=()
for seed in $SEEDS; do
  stage "04 train, seed $seed" python 04_train_stepdpo.py --data "$OUT/pairs.jsonl" --model $MODEL --out "$OUT/model-$seed" \
    --lr 3e-5 --beta 1 --epochs 2 --batch-size 32 --validation-fraction 0.05 --eval-steps 10 --log-steps 5 --keep 0 --seed "$seed"
  tuned+=("$OUT/model-$seed")
done
stage "05 evaluate" python 05_eval.py --data data/tiny/test.jsonl --max-tokens 400 --limit "$TEST_PROBLEMS" \
  --models "base=$MODEL" "Step-DPO=$(IFS=,; echo "${tuned[*]}")" --check-contamination "$OUT/pairs.jsonl" \
  --out "$OUT/results" --server-args="--max-num-seqs 512 --max-model-len 1024"
printf '\nWhere the time went:\n%s%-28s %4d s\n' "$times" all $SECONDS
echo "The whole report with pictures and responses: $OUT/results/report.html"
