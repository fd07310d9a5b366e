"""`make demo`: serve SmolLM2-135M-Instruct with and without the SlimSpec drafter that this repository ships.

Everything is real: an unmodified `vllm serve` loads the plugin that is installed, and the official OpenAI client asks
it questions of MT-Bench, HumanEval and GSM8K, one at a time, streamed, and several at once. The same requests go to the
target alone first. Every answer must be the same, token for token, and only the speed may differ.

Expected output, in four to eight minutes on 2 CPU cores: some answers, the tokens per second with and without the
drafter, the acceptance length, and build/demo/result.json.
"""

import json
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import openai
import torch
from rich.console import Console
from rich.table import Table

from vllm_slimspec.common.console import one_line_errors
from vllm_slimspec.common.device import device_name
from vllm_slimspec.common.output import claim_work
from vllm_slimspec.common.progress import progress, steps
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.engine.acceptance import Acceptance, from_server
from vllm_slimspec.engine.server import Server

ROOT = Path(__file__).resolve().parent.parent
TARGET, DRAFTER = ROOT / "build" / "smollm2-135m-instruct", ROOT / "examples" / "smollm2-135m-instruct"
QUESTIONS = ROOT / "build" / "smollm2" / "questions"
BUILD = ROOT / "build" / "demo"
NAME = "SmolLM2-135M-Instruct"
K = 3
TOKENS = 64  # of an answer, at most
OF_EACH = 8  # questions of each of the three sets: these many are plain, streamed, and at once
NEAR_TIE = 1e-4  # log-probability


@dataclass(frozen=True)
class Answer:
    """What came back for one question: token ids, their text, and the best log-probabilities at every place."""

    ids: list[int]
    text: str
    best: list[list[float]]


@dataclass(frozen=True)
class Served:
    """All answers of one server, and the tokens per second of those that were asked for one at a time."""

    answers: list[Answer]
    tokens_per_second: float


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server below is stopped too
    questions = read_questions()
    with _serve("the target alone") as server:
        alone = ask(server.url, questions)
    speculative = {"method": "eagle3", "model": str(DRAFTER), "num_speculative_tokens": K}
    with _serve("the target with the drafter", "--speculative-config", json.dumps(speculative)) as server:
        before = from_server(server.url)
        drafted = ask(server.url, questions)
        acceptance = from_server(server.url) - before
        log = server.log.read_text(errors="replace")

    differing = [(a, d) for a, d in zip(alone.answers, drafted.answers, strict=True) if a.ids != d.ids]
    result = {
        "kind": "demo",
        "target": NAME,
        "device": device_name(torch.accelerator.current_accelerator() or torch.device("cpu")),
        "questions": len(questions),
        "requests": len(questions),
        "greedy_identical": not differing,
        "near_ties": sum(_near_tie(*pair) for pair in differing),
        "tokens_per_second": {"none": alone.tokens_per_second, "slimspec": drafted.tokens_per_second},
        **_drafting(acceptance, log),
        "versions": _versions(),
    }
    (BUILD / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    _summary(questions, drafted.answers, result)
    if differing:
        sys.exit(f"error: {len(differing)} answers differ from the target's own")


def read_questions() -> list[str]:
    """Take the first questions of every set, in turn."""
    sets = []
    for name in ("mt-bench", "gsm8k", "humaneval"):
        lines = (QUESTIONS / f"{name}.jsonl").read_text().splitlines()[:OF_EACH]
        sets.append([json.loads(line)["messages"][0]["content"] for line in lines])
    return [question for turn in zip(*sets, strict=True) for question in turn]


@contextmanager
def _serve(name: str, *arguments: str) -> Iterator[Server]:
    """Start `vllm serve` on a free port of the loopback interface, in float32 so that equality is exact."""
    # On a CPU: 1 GiB for the cache instead of most of the machine's memory.
    env = {} if torch.cuda.is_available() else {"VLLM_CPU_KVCACHE_SPACE": "1"}
    options = ["--dtype", "float32", "--max-model-len", "1024", "--served-model-name", NAME, "--enforce-eager"]
    log = BUILD / f"{name.replace(' ', '-')}.log"
    with ExitStack() as stack:
        with progress(f"Starting vllm serve: {name}"):
            server = stack.enter_context(Server(TARGET, [*options, *arguments], log=log, env=env))
        # This process asks the questions, and leaves the cores of the server's workers alone meanwhile.
        stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        os.sched_setaffinity(0, server.client_cores)
        yield server


def ask(url: str, questions: Sequence[str]) -> Served:
    """Ask the first third of the questions one by one, stream the answers to the second, and ask the rest at once."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    options: dict[str, Any] = {
        "model": NAME,
        "max_tokens": TOKENS,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
        "extra_body": {"return_token_ids": True},
    }

    def plain(question: str) -> Answer:
        choice = client.chat.completions.create(messages=_said(question), **options).choices[0]
        return Answer(choice.token_ids, choice.message.content or "", _best([choice]))

    def streamed(question: str) -> Answer:
        chunks = client.chat.completions.create(messages=_said(question), stream=True, **options)
        parts = [part for chunk in chunks for part in chunk.choices]
        ids = [i for part in parts for i in getattr(part, "token_ids", None) or ()]
        return Answer(ids, "".join(part.delta.content or "" for part in parts), _best(parts))

    plain(questions[0])  # the first request of a server warms it up
    alone, at_once = questions[: 2 * OF_EACH], questions[2 * OF_EACH :]
    ways = [plain] * OF_EACH + [streamed] * OF_EACH
    start = time.perf_counter()
    with progress("Questions, one at a time", len(alone), "question") as shown:
        answers = []
        for way, question in zip(ways, alone, strict=True):
            answers.append(way(question))
            shown.update()
    seconds = time.perf_counter() - start
    with ThreadPoolExecutor(len(at_once)) as pool:
        together = list(steps(pool.map(plain, at_once), "Questions, all at once", len(at_once), "question"))
    return Served([*answers, *together], sum(len(answer.ids) for answer in answers) / seconds)


def _said(question: str) -> list[Any]:
    return [{"role": "user", "content": question}]


def _best(parts: Iterable[Any]) -> list[list[float]]:
    places = [place for part in parts if part.logprobs for place in part.logprobs.content or ()]
    return [sorted((other.logprob for other in place.top_logprobs), reverse=True) for place in places]


def _near_tie(alone: Answer, drafted: Answer) -> bool:
    """Say whether the target hardly preferred its own token at the first place where the answers differ."""
    pairs = zip(alone.ids, drafted.ids, strict=False)
    place = next((i for i, (a, d) in enumerate(pairs) if a != d), None)
    if place is None:  # one answer is the beginning of the other
        return False
    best, second, *_ = alone.best[place]
    return best - second < NEAR_TIE


def _drafting(acceptance: Acceptance, log: str) -> dict[str, Any]:
    checkpoint = DraftCheckpoint.open(DRAFTER)
    spec = checkpoint.spec
    assert spec is not None
    impl = re.search(r"fused argmax \((\w+)\)", log)
    return {
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
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("vllm-slimspec", "vllm", "torch", "transformers", "openai"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _summary(questions: Sequence[str], answers: Sequence[Answer], result: dict[str, Any]) -> None:
    out = Console()
    for question, answer in list(zip(questions, answers, strict=True))[:3]:
        out.rule(style="dim")
        out.print(question, style="dim", markup=False, highlight=False)
        out.print(answer.text, style="bold", markup=False, highlight=False)
    out.rule(style="dim")
    head, speed = result["head"], result["tokens_per_second"]
    rates = " ".join(f"{rate:.2f}" for rate in result["acceptance_per_position"])
    equal = f"all {result['questions']}" if result["greedy_identical"] else f"NOT all ({result['near_ties']} near ties)"
    table = Table(show_header=False, box=None)
    table.add_row("target", NAME)
    table.add_row("answers equal to the target's own", equal)
    table.add_row("tokens per second, the target alone", f"{speed['none']:.1f}")
    table.add_row(
        "tokens per second with the drafter",
        f"{speed['slimspec']:.1f} ({speed['slimspec'] / speed['none']:.2f} times as many)",
    )
    table.add_row("acceptance length", f"{result['acceptance_length']:.2f} tokens a cycle, K = {K}")
    table.add_row("accepted at positions 1, 2, 3", rates)
    table.add_row(
        "draft head",
        f"rank {head['rank']}, {head['bytes'] / 1e6:.1f} MB in place of {head['dense_bytes'] / 1e6:.1f} MB "
        f"({head['dense_bytes'] / head['bytes']:.1f} times less)",
    )
    table.add_row("fused path", f"{'yes' if result['fused_path'] else 'no'} ({result['impl']})")
    table.add_row("written", str((BUILD / "result.json").relative_to(ROOT)))
    out.print(table)


if __name__ == "__main__":
    with one_line_errors(), claim_work(BUILD):
        main()
