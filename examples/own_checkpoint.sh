#!/usr/bin/env bash
# From a Hugging Face checkpoint to text out of ONNX Runtime: examples/own_checkpoint.sh CHECKPOINT DATA OUT
#   CHECKPOINT  a directory with config.json and safetensors      DATA  .jsonl or .txt to tune on      OUT  a new folder
set -euo pipefail
[ $# -eq 3 ] || { sed -n '2,3s/^# //p' "$0" >&2; exit 2; }
checkpoint=$1 data=$2 out=$3
mkdir "$out"
liger-deploy convert --model "$checkpoint" --out "$out/converted"
liger-deploy finetune --model "$out/converted" --data "$data" --out "$out/adapter" ${FINETUNE:-}
liger-deploy merge --model "$out/converted" --adapter "$out/adapter" --out "$out/tuned"
liger-deploy evaluate --model "$checkpoint" "$out/converted" "$out/tuned" --data "$data" --max-tokens 20000
liger-deploy export --target onnx --model "$out/tuned" --out "$out/bundle"
liger-deploy verify --bundle "$out/bundle" --model "$out/tuned" --tokens 64
liger-deploy generate --bundle "$out/bundle" --prompt "${PROMPT:-Hello}" --max-new-tokens 40
