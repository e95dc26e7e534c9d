#!/usr/bin/env bash
# Step-Controlled DPO for code-integrated solutions (arXiv 2407.00782): text, code that is run, and its output, in turns.
#
# Hardware   8 GPUs with 80 GB, and bubblewrap (Debian: apt install bubblewrap), the sandbox for the model's code. Run here only
#            as a test, on the bundled world with code (figures: docs/code.md):
#              python data/tiny/make.py --format code --start data/tiny/model --steps 200 --lr 1e-3 --out runs/code \
#                --work runs/code/work
#              MODEL=runs/code/model DATA=runs/code/train.jsonl TEST=runs/code/test.jsonl LIMIT=200 LAUNCH= SERVE= LR=1e-5 \
#                HF_HUB_OFFLINE=1 OUT=runs/scdpo_code bash recipes/scdpo_mistral_7b_code.sh
# Hours      not measured
# Disk       200 GB: a checkpoint with optimizer state is 87 GB, and the next one is complete before the last one is deleted
# Published  Mistral-7B-Ours: SFT 76.8 on GSM8K and 43.2 on MATH; DPO 78.8, 45.1; DPO with equal data 79.0, 45.7; SCDPO 80.1, 47.7.
#            7K + 5K naive pairs and 6K + 12K step-controlled ones
# Model      the authors' SFT model. For one of your own: analysis/add_block_tokens.py, then 04_train_stepdpo.py --objective sft
#            --lr 1e-5 --epochs 3 --batch-size 64 --max-length 2048 on rows {"problem", "solution"} whose solution is blocks.
# Where paper and code differ
#   system   empty in the data and in this recipe. The 7B evaluation has one:
#            --chat-template-kwargs '{"system": "Below is a math problem. Please solve it step by step."}', to add to `asked` and `manner`
#            in the evaluation
#   rounds   64 of at most 512 tokens in sampling (MathCoder's naive pairs 8), 24 in evaluation: --rounds of
#            serving/code_server.py, which runs the code
#   heat     rises each round. Paper: 1.1 + 0.05 to 1.4. Code: 1.1 + 0.1 to 1.4 (HEAT="1.1 0.1 1.4"); MathCoder's MATH 1.0 + 0.05
#            to 1.3, InternLM's MATH 1.0 + 0.05 to 1.2: one run for each set
#   step k   paper: one of one right solution, drawn; here one of each of at most two. Code: every one of the first right
#            solution, from 1: SOLUTIONS=1 EVERY=--every-step
#            The set in its configuration for this model has no naive pairs, k from 0, and at most two pairs of a GSM8K problem and
#            three of a MATH problem: EVERY="--every-step --first-k 0 --pairs-per-problem 2", and one run of 03 for each set
#   masks    code: none, output of code is trained on. Here only with EXECUTION=--train-execution
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${VIRTUAL_ENV:-}" ] || [ ! -d .venv ] || export PATH="$PWD/.venv/bin:$PATH"
# INT, TERM or a hangup to this script alone ends the running stage too, and so the engine in it
job= server=; run() { set -m; "$@" & job=$!; set +m; wait $job; }
trap 'kill -TERM -- -$job $server 2>/dev/null || true; wait; exit 130' INT TERM HUP
MODEL=${MODEL:-MathGenie/Mistral-7B-Ours-SFT} OUT=${OUT:-runs/scdpo_7b_code} BETA=${BETA:-0.1} HEAT=${HEAT:-1.1 0.05 1.4}
DATA=${DATA:-} TEST=${TEST:-} LIMIT=${LIMIT:-} TRIES=${TRIES:-8} LR=${LR:-1e-7} GPUS=${GPUS:-8}
SOLUTIONS=${SOLUTIONS:-2} EVERY=${EVERY:-}
EXECUTION=${EXECUTION:-} SANDBOX=${SANDBOX:-}  # SANDBOX=--unsafe-no-sandbox: in a container that is one already
LAUNCH=${LAUNCH---config_file configs/fsdp2.yaml --num_processes $GPUS}
SERVE=${SERVE---engine-args=--data-parallel-size $GPUS --max-model-len 4096} PORT=${PORT:-8100}
export OPENAI_API_KEY=${OPENAI_API_KEY:-$(python -c "import secrets; print(secrets.token_hex(16))")}
serve() {  # serve MODEL OPTIONS: the server that runs the code of this model's solutions
  mkdir -p "$OUT"; rm -f "$OUT/server.out"
  python serving/code_server.py --model "$@" --port "$PORT" $SANDBOX ${SERVE:+"$SERVE"} >"$OUT/server.out" & server=$!
  until grep -q ^ready "$OUT/server.out"; do kill -0 $server 2>/dev/null || exit 2; sleep 1; done
}
end_server() { kill $server; wait $server || true; server=; }
trap '[ -z "$server" ] || kill $server' EXIT
manner=(--chat-template data/templates/code.jinja --opening "" --split blocks --max-tokens 512)
asked=("${manner[@]}" --base-url "http://127.0.0.1:$PORT/v1")
[ -n "$DATA" ] && [ -n "$TEST" ] || run python data/download.py gsm8k math
DATA=${DATA:-data/gsm8k_train.jsonl data/math_train.jsonl} TEST=${TEST:-data/gsm8k_test.jsonl data/math_test.jsonl}
serve "$MODEL"
run python 01_sample_errors.py --data $DATA --model "$MODEL" "${asked[@]}" --temperature 1 --top-p 1 --n 4 --until-both 100 \
  ${LIMIT:+--limit $LIMIT} --out "$OUT/samples.jsonl"
run python 03_rectify.py --method dpo --samples "$OUT/samples.jsonl" "${manner[@]}" --out "$OUT/naive.jsonl"
run python 03_rectify.py --method scdpo --samples "$OUT/samples.jsonl" --model "$MODEL" "${asked[@]}" --heat $HEAT \
  --tries "$TRIES" --solutions-per-problem "$SOLUTIONS" $EVERY --out "$OUT/controlled.jsonl"
end_server
run accelerate launch $LAUNCH 04_train_stepdpo.py --model "$MODEL" --chat-template data/templates/code.jinja $EXECUTION \
  --data "$OUT/naive.jsonl" "$OUT/controlled.jsonl" --lr "$LR" --beta "$BETA" --epochs 2 --batch-size 64 --max-length 1024 \
  --gradient-checkpointing --tokens-per-batch 8192 --out "$OUT/model" --save-steps 300 --keep 1
run python analysis/plot_training.py "$OUT/model"
evaluate() {  # evaluate MODELS: the rows of one model need its server; the report needs none
  run python 05_eval.py --data $TEST ${LIMIT:+--limit $LIMIT} --models "$@" --out "$OUT/results"
}
for model in "$MODEL" "$OUT/model"; do
  serve "$model" --rounds 24
  evaluate "$model" "${asked[@]}"
  end_server
done
evaluate "base=$MODEL" "SCDPO=$OUT/model" "${manner[@]}"
run python analysis/regrade.py "$OUT/results" --verdict scdpo  # adds the verdicts of the papers' own code
run python analysis/report.py "$OUT/results"  # pictures and a page
