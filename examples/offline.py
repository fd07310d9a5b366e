"""Generate with a SlimSpec drafter in vLLM's offline engine.

    python examples/offline.py TARGET DRAFTER "first prompt" "second prompt"

Expected output: each completion, which is the target's own, and the acceptance length, for instance
"acceptance length 2.1 at K=3" (1.0 would mean that no draft was ever accepted). On 2 CPU cores the engine of a model of
135M parameters starts in one to two minutes, and answers in seconds.
"""

import argparse

from vllm import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate with a SlimSpec drafter.")
    parser.add_argument("target")
    parser.add_argument("drafter")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("-k", type=int, default=3, help="num_speculative_tokens")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()

    llm = LLM(
        model=args.target,
        speculative_config={"model": args.drafter, "num_speculative_tokens": args.k},
        max_model_len=args.max_model_len,
        dtype=args.dtype,
        disable_log_stats=False,  # for the acceptance counters
    )
    for output in llm.generate(args.prompts, SamplingParams(temperature=0, max_tokens=64)):
        print(f"\n{output.prompt}{output.outputs[0].text}")
    counted = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    accepted = counted["vllm:spec_decode_num_accepted_tokens"] / counted["vllm:spec_decode_num_drafts"]
    print(f"\nacceptance length {1 + accepted:.2f} at K={args.k}")


if __name__ == "__main__":  # vLLM starts its engine in a process that imports this file again
    main()
