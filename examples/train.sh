#!/usr/bin/env bash
# Train a drafter with a low-rank head for a chat model, from nothing but the model.
#
#   bash examples/train.sh TARGET OUTPUT [more options of `slimspec train`]
#
# The target writes its own prompts and answers them. Its hidden states are stored, and the drafter is trained on them. The
# first command prints what that will cost and starts nothing. The second one resumes when you run it again after a stop.
#
# Expected output: the plan; then a line for each stage and epoch, with the acceptance length on answers that were held out;
# then what `slimspec inspect` says of the folder. On 2 CPU cores, the drafters of SmolLM2-135M-Instruct in this repository took
# about two hours each, after their hidden states were stored: 2,470 steps of 1,024 tokens.
set -euo pipefail
target=${1:?usage: train.sh TARGET OUTPUT [options]}
output=${2:?usage: train.sh TARGET OUTPUT [options]}
shift 2
slimspec train --target "$target" --output-path "$output" --plan "$@"
slimspec train --target "$target" --output-path "$output" "$@"
slimspec inspect "$output"
