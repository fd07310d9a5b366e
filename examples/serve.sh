#!/usr/bin/env bash
# Serve a target with a SlimSpec drafter by an ordinary `vllm serve`. The plugin needs no flag of its own.
#
#   bash examples/serve.sh TARGET DRAFTER [more arguments of vllm serve]
#
# Expected output, in the log: "SlimSpec draft head: rank R of D, ... fused argmax (triton)" ("torch" on a CPU).
set -euo pipefail
target=${1:?usage: serve.sh TARGET DRAFTER [arguments]}
drafter=${2:?usage: serve.sh TARGET DRAFTER [arguments]}
shift 2
exec vllm serve "$target" \
  --speculative-config "{\"method\": \"eagle3\", \"model\": \"$drafter\", \"num_speculative_tokens\": 5}" "$@"
