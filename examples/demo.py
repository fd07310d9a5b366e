"""`make demo`: train a tiny target and a SlimSpec drafter, serve both with vLLM, and check that only speed changes.

Everything is real: the drafter is trained on speculators, served by an unmodified `vllm serve` through the installed
plugin, and asked through the official OpenAI client. The same requests go to the target alone first, and every greedy
answer must be the same, token for token.

Expected output (2 CPU cores, 10 to 15 minutes the first time, 2 minutes with the trained pair at hand): a few
completions, an acceptance length above 2 at K=3, "all of 64" answers equal, and build/demo/result.json.
"""

import json
import platform
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import openai
import tiny_pair
from rich.console import Console
from rich.table import Table

from vllm_slimspec.bench.acceptance import Acceptance, from_server
from vllm_slimspec.bench.server import Server
from vllm_slimspec.checkpoint import DraftCheckpoint
from vllm_slimspec.console import one_line_errors
from vllm_slimspec.output import claim_work
from vllm_slimspec.progress import progress, steps

BUILD = Path(__file__).resolve().parent.parent / "build" / "demo"
K = 3
TOKENS = 32
PLAIN, STREAMING, CONCURRENCY = 8, 8, 16  # one by one, one by one, and the rest 16 at a time
NEAR_TIE = 1e-4  # log-probability


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt: token ids, their text, and the runners-up at every place."""

    ids: list[int]
    text: str
    top: list[dict[str, float]]


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server below is stopped too
    with progress("demo", ends=False):
        _run()


def _run() -> None:
    pair = tiny_pair.build(BUILD)
    with _serve(pair.target, "target alone") as server:
        alone = _ask(server.url, pair.prompts)
    speculative = json.dumps({"method": "eagle3", "model": str(pair.drafter), "num_speculative_tokens": K})
    with _serve(pair.target, "target and drafter", "--speculative-config", speculative) as server:
        before = from_server(server.url)
        drafted = _ask(server.url, pair.prompts)
        acceptance = from_server(server.url) - before
        log = server.output()

    differing = [(a, d) for a, d in zip(alone, drafted, strict=True) if a.ids != d.ids]
    result = _result(pair.drafter, log, acceptance, len(alone), len(differing), sum(_near_tie(*x) for x in differing))
    (BUILD / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    _summary(pair.prompts, drafted, result)
    if not result["greedy_identical"]:
        sys.exit(f"error: {len(differing)} answers differ from the target's own")


@contextmanager
def _serve(target: Path, name: str, *arguments: str) -> Iterator[Server]:
    """`vllm serve` on a free port of the loopback interface, in float32 so that equality is exact."""
    import torch

    # On a CPU: 1 GiB for the cache instead of most of the machine's memory.
    env = {} if torch.cuda.is_available() else {"VLLM_CPU_KVCACHE_SPACE": "1"}
    options = ["--dtype", "float32", "--max-model-len", "256", "--served-model-name", "tiny", "--enforce-eager"]
    log = BUILD / f"{name.replace(' ', '-')}.log"
    with ExitStack() as stack:
        with progress(f"Starting vllm serve, {name}"):
            server = stack.enter_context(Server(target, [*options, *arguments], log=log, env=env))
        yield server


def _ask(url: str, prompts: Sequence[str]) -> list[Answer]:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    options: dict[str, Any] = {
        "model": "tiny",
        "max_tokens": TOKENS,
        "temperature": 0,
        "logprobs": 5,
        "extra_body": {"ignore_eos": True, "return_token_ids": True},
    }

    def plain(prompt: str) -> Answer:
        choice = client.completions.create(prompt=prompt, **options).choices[0]
        return Answer(choice.token_ids, choice.text, choice.logprobs.top_logprobs)

    def streaming(prompt: str) -> Answer:
        parts = [c for p in client.completions.create(prompt=prompt, stream=True, **options) for c in p.choices]
        return Answer(
            [i for part in parts for i in part.token_ids or ()],
            "".join(part.text for part in parts),
            [top for part in parts if part.logprobs for top in part.logprobs.top_logprobs or ()],
        )

    first, second, rest = prompts[:PLAIN], prompts[PLAIN : PLAIN + STREAMING], prompts[PLAIN + STREAMING :]
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        answers = chain(map(plain, first), map(streaming, second), pool.map(plain, rest))
        return list(steps(answers, "Requests", len(prompts), "request"))


def _near_tie(alone: Answer, drafted: Answer) -> bool:
    """Whether the target itself hardly preferred its own token at the first place where the answers differ."""
    place = next(i for i, (a, d) in enumerate(zip(alone.ids, drafted.ids, strict=False)) if a != d)
    best, second = sorted(alone.top[place].values(), reverse=True)[:2]
    return best - second < NEAR_TIE


def _result(
    drafter: Path, log: str, acceptance: Acceptance, requests: int, differing: int, near_ties: int
) -> dict[str, Any]:
    checkpoint = DraftCheckpoint.open(drafter)
    spec = checkpoint.spec
    assert spec is not None
    impl = re.search(r"fused argmax \((\w+)\)", log)
    return {
        "kind": "demo",
        "greedy_identical": differing == 0,
        "near_ties": near_ties,
        "requests": requests,
        "acceptance_length": acceptance.length,
        "acceptance_per_position": acceptance.per_position,
        "num_speculative_tokens": K,
        "head": {
            "kind": "low-rank",
            "rank": spec.rank,
            "draft_vocab_size": spec.draft_vocab_size,
            "bytes": checkpoint.head_bytes,
            "dense_bytes": checkpoint.dense_bytes,
        },
        # The draft model says so itself on the first call of either method.
        "fused_path": "SlimSpec: drafting by the fused path" in log and "by the dense path" not in log,
        "impl": impl[1] if impl else None,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("vllm-slimspec", "vllm", "torch", "transformers", "speculators", "openai"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _summary(prompts: Sequence[str], answers: Sequence[Answer], result: dict[str, Any]) -> None:
    out = Console()
    for prompt, answer in list(zip(prompts, answers, strict=True))[:3]:
        out.rule(style="dim")
        out.print(prompt[-200:], style="dim", end="", markup=False, highlight=False)
        out.print(answer.text, style="bold", markup=False, highlight=False)
    out.rule(style="dim")
    head = result["head"]
    rates = " ".join(f"{rate:.2f}" for rate in result["acceptance_per_position"])
    differing = "all" if result["greedy_identical"] else f"NOT all ({result['near_ties']} near ties)"
    table = Table(show_header=False, box=None)
    table.add_row("answers equal to the target's own", f"{differing} of {result['requests']}")
    table.add_row("acceptance length", f"{result['acceptance_length']:.2f} tokens a cycle (K={K})")
    table.add_row("accepted at position 1 2 3", rates)
    table.add_row(
        "draft head",
        f"rank {head['rank']}, {head['bytes'] / 1e3:.0f} kB against {head['dense_bytes'] / 1e3:.0f} kB dense "
        f"({head['dense_bytes'] / head['bytes']:.1f}x less)",
    )
    table.add_row("fused path", f"{'yes' if result['fused_path'] else 'no'} ({result['impl']})")
    table.add_row("written", "build/demo/result.json")
    out.print(table)


if __name__ == "__main__":
    with one_line_errors(), claim_work(BUILD):
        main()
