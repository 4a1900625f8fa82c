#!/bin/sh
# Influence of OpenWebText on answers of Llama-3.1-8B-Instruct, as published for GraSS: a billion tokens in blocks of
# 1,024, FactGraSS to 4,096 numbers for each linear layer, 20 workers, and the five leading blocks of each answer.
#
#   sh recipes/grids/grass-llama.sh grass-llama
#
# A command that was interrupted goes on when the script is started again. Every line can be set from outside:
set -eu
OUT=${1:-grass-llama}
: "${MODEL:=meta-llama/Llama-3.1-8B-Instruct}"
: "${DATA:=Skylion007/openwebtext}"
: "${ROWS:=900000}" # of about 1,100 tokens each
: "${BLOCK:=1024}"
: "${PROMPTS:=prompts.jsonl}"
: "${COMPRESS:=Random-128*128 | SJLT-4096}"
: "${DAMPING:=1e-5}"
: "${TOKENS:=500}"
: "${RUNS:=--device cuda --precision bfloat16}"
: "${CLUSTER:=--engine slurm --workers 20 --gres gpu:1 --time 8:00:00}"

[ -e "$OUT/blocks" ] || vestige data tokenize --data "$DATA" --limit "$ROWS" --tokenizer "$MODEL" --block-size "$BLOCK" --out "$OUT/blocks"
vestige index --model "$MODEL" --data "$OUT/blocks" --components attention mlp --compress "$COMPRESS" $RUNS $CLUSTER --out "$OUT/cache"
vestige precondition "$OUT/cache" --damping "$DAMPING" $CLUSTER
vestige data generate --model "$MODEL" --data "$PROMPTS" --chat --temperature 0.7 --max-new-tokens "$TOKENS" $RUNS --out "$OUT/answers"
vestige attribute --index "$OUT/cache" --queries "$OUT/answers" --damping "$DAMPING" --k 5 $RUNS $CLUSTER --out "$OUT/influence"
vestige export "$OUT/influence" --to json --out "$OUT/influence-json"
