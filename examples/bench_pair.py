"""`make bench-pair`: conversion on a larger pair, where the rank of the head is less of a squeeze: D = 256, R = 32.

    python examples/bench_pair.py build/bench-pair --json docs/results/convert-bench-pair.json

The target of tiny_target.py at twice the width, a dense drafter for it, and the conversions of convert_and_serve.py,
each served by vLLM over the same held-out prompts. A part that is done stays done: stop it when you like and run it
again. `--only target`, `drafter` or `states` ends there.

Expected output: the table of convert_and_serve.py, and "all answers are the target's own".
"""

import argparse
from pathlib import Path
from typing import Any

import convert_and_serve
import tiny_pair
import tiny_target
from transformers import LlamaConfig

from vllm_slimspec.bench.options import claim_results
from vllm_slimspec.console import one_line_errors
from vllm_slimspec.train.replaced import replaced

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
HEAD_STEPS, JOINT_STEPS = 400, 150
WAYS = (
    "weighted",
    "weighted + distilled head",
    "weighted + distilled head, then jointly on more",
    "weighted + rerank 16",
    "weighted + rerank 64",
)


def build_target(target: Path) -> None:
    """The corpus, tokenizer and training of the tiny target, with other sizes."""
    # Not arguments of tiny_target.py: whatever is trained for its target is trained again when that file changes.
    with replaced(tiny_target, LlamaConfig=lambda **tiny: LlamaConfig(**tiny | SIZES)):
        tiny_target.build(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=("target", "drafter", "states"))
    args = parser.parse_args()
    with claim_results(args.json):
        run(args.folder, args.only, args.json)


def run(folder: Path, only: str | None, json: Path | None) -> None:
    """Make the pair, convert its drafter in every way and serve it, or only the first steps of that."""
    target, prompts = folder / "target", folder / "prompts.jsonl"
    tiny_pair.once(target, str(SIZES), lambda: build_target(target))
    if only == "target":
        return
    dense = convert_and_serve.dense_drafter(folder, target)
    if only == "drafter":
        return
    states = convert_and_serve.record_states(folder, target, dense)
    if only == "states":
        return
    tiny_pair.write_prompts(target, prompts)
    data = convert_and_serve.training_states(folder, target)
    ways = convert_and_serve.ways(states, data, HEAD_STEPS, JOINT_STEPS)
    chosen = {name: ways[name] for name in WAYS}
    served = convert_and_serve.compare(folder, target, dense, tiny_pair.read_prompts(prompts), chosen)
    convert_and_serve.report(served, json)


if __name__ == "__main__":
    with one_line_errors():
        main()
