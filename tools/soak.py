"""Serve a SlimSpec drafter under load, and compare every answer with the target's own.

    python tools/soak.py --seconds 600 --json docs/results/soak.json      (`make soak`)

First `vllm serve` runs the target alone. It answers every prompt once, and is then loaded for two fifths of the time,
which shows how its own memory grows. Then it runs the target with its drafter, with prefix caching, chunked prefill,
and a key-value cache so small that requests are preempted. Concurrent OpenAI clients send requests without a pause:
plain and streamed, of any length, with stop strings, for a single token, and closed in the middle.

Everything is greedy and in float32, so that each answer must be the target's own. Where two answers differ, the gap
between the target's log-probabilities of both tokens must be below NEAR_TIE, and that may happen to one token in ten
thousand. At the end no request runs, no cache is held for a request, the server's memory is where it was, and its
processes are gone.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import torch
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

from vllm_slimspec.common.process import last_words
from vllm_slimspec.engine.acceptance import from_server
from vllm_slimspec.engine.server import Server
from vllm_slimspec.errors import EngineError
from vllm_slimspec.measure.results import Results, provenance

K = 3
CLIENTS = 32
PROMPTS, LONGEST_PROMPT, LONGEST_ANSWER = 256, 160, 64  # tokens
MANY = 100  # errors, after which nobody asks any more
NEAR_TIE, NEAR_TIES_ALLOWED = 1e-4, 1e-4  # log-probability; share of the tokens
# MB a minute more than the target alone, of runs long enough to see it: at first vLLM and its libraries keep one more
# buffer for each new shape.
FLAT, LONG = 10, 240
KINDS = {"plain": 6, "streamed": 4, "stop string": 3, "one token": 2, "hung up": 3}
MODEL = "soak"
OPTIONS = [
    *("--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--served-model-name", MODEL),
    *("--max-num-seqs", str(CLIENTS), "--enable-prefix-caching"),
    *("--enable-chunked-prefill", "--max-num-batched-tokens", "192"),
]
# A third of what the clients' longest requests would need at once: the rest is preempted, and computed again.
CACHE = ["--block-size", "32", "--num-gpu-blocks-override", "76"]
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
}


@dataclass(frozen=True)
class Answer:
    """The target's own answer: its ids, its text, and the log-probabilities of the five best tokens at each place."""

    ids: list[int]
    text: str
    top: list[dict[str, float]]
    words: list[str]  # the tokens as the server writes them


@dataclass
class Tally:
    """The counts of answers and errors that the clients saw."""

    requests: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    near_ties: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


class Memory(BaseModel):
    """The resident memory of a process under load, in MB."""

    start: float
    end: float
    slope_per_minute: float  # of a straight line through the second half


class Soak(Results):
    """The results of one run."""

    kind: str = "soak"
    seconds: float
    clients: int
    requests: dict[str, int]
    tokens: int
    wrong: int
    errors: int  # requests that got none
    near_ties: int
    preemptions: int
    prefix_cache_hits: int  # tokens
    acceptance_length: float
    memory: dict[str, "Memory"]  # by process: the server in front, the engine, the workers that hold the models
    memory_alone: dict[str, "Memory"]  # without a drafter, under the same clients
    left_running: int  # requests that the server still had when no client asked any more
    left_processes: int


def make_prompts(seeds: list[list[int]], seed: int = 0) -> list[list[int]]:
    """Return prompts of 1 to LONGEST_PROMPT tokens, made of pieces of ``seeds``. A third has a common beginning."""
    rng = random.Random(seed)

    def text(length: int) -> list[int]:
        tokens: list[int] = []
        while len(tokens) < length:
            tokens += rng.choice(seeds)
        return tokens[:length]

    shared = text(96)
    prompts = [text(rng.randint(1, LONGEST_PROMPT)) for _ in range(PROMPTS * 2 // 3)]
    return prompts + [shared + text(rng.randint(1, LONGEST_PROMPT - 96)) for _ in range(PROMPTS - len(prompts))]


def client_of(server: Server) -> openai.AsyncOpenAI:
    # The server closes a connection after 5 idle seconds; one of more than 2 is not used again, lest the two meet.
    http = httpx.AsyncClient(limits=httpx.Limits(max_connections=CLIENTS * 2, keepalive_expiry=2), timeout=300)
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=http)


def request(prompt: list[int], **options: Any) -> dict[str, Any]:
    extra = {"ignore_eos": True, "return_token_ids": True}
    return {
        "model": MODEL,
        "prompt": prompt,
        "temperature": 0,
        "extra_body": extra,
        "max_tokens": LONGEST_ANSWER,
    } | options


async def reference(server: Server, prompts: list[list[int]]) -> list[Answer]:
    """Return the answers of the target alone, eight requests at a time."""
    limit = asyncio.Semaphore(8)

    async def one(client: openai.AsyncOpenAI, prompt: list[int]) -> Answer:
        async with limit:
            choice = (await client.completions.create(**request(prompt, logprobs=5))).choices[0]
        return Answer(choice.token_ids, choice.text, choice.logprobs.top_logprobs, choice.logprobs.tokens)

    async with client_of(server) as client:
        return list(await asyncio.gather(*(one(client, prompt) for prompt in prompts)))


def compare(tally: Tally, kind: str, expected: Answer, ids: list[int], text: str | None, words: list[str]) -> None:
    """Count an answer as equal to the target's own, as different at a near tie, or as wrong."""
    tally.requests[kind] += 1
    tally.tokens += len(ids)
    place = next((i for i, (a, b) in enumerate(zip(expected.ids, ids, strict=False)) if a != b), None)
    if place is None:
        if text is not None and text != expected.text[: len(text)]:
            tally.wrong.append(f"{kind}: the same tokens, another text: {text!r} for {expected.text!r}")
        return
    theirs = expected.top[place].get(words[place]) if place < len(words) else None
    gap = expected.top[place][expected.words[place]] - theirs if theirs is not None else float("inf")
    if gap < NEAR_TIE:
        tally.near_ties += 1
    else:
        tally.wrong.append(f"{kind}: {ids[place]} for {expected.ids[place]} at {place}, gap {gap:.3g}")


async def ask(
    client: openai.AsyncOpenAI, rng: random.Random, prompts: list[list[int]], answers: list[Answer], tally: Tally
) -> None:
    """Send a request of a random kind, and compare its answer with the expected one."""
    i = rng.randrange(len(prompts))
    expected, kind = answers[i], rng.choices(list(KINDS), list(KINDS.values()))[0]
    if kind in ("streamed", "hung up"):
        ids: list[int] = []
        text, words = "", []
        patience = rng.randint(1, 20) if kind == "hung up" else LONGEST_ANSWER + 1
        stream = await client.completions.create(**request(prompts[i], stream=True, logprobs=0))
        async for part in stream:
            for choice in part.choices:
                ids += choice.token_ids or []
                text += choice.text
                words += choice.logprobs.tokens if choice.logprobs else []
            patience -= 1
            if not patience:
                break
        await stream.close()
        if kind == "streamed" and len(ids) != LONGEST_ANSWER:
            tally.wrong.append(f"{kind}: {len(ids)} tokens for {LONGEST_ANSWER}")
        compare(tally, kind, expected, ids, text, words)
        return
    options: dict[str, Any] = {"max_tokens": rng.randint(2, LONGEST_ANSWER), "logprobs": 0}
    if kind == "one token":
        options["max_tokens"] = 1
    elif kind == "stop string":
        options |= {"max_tokens": LONGEST_ANSWER, "stop": rng.choice(expected.words[4:]).strip()}
    choice = (await client.completions.create(**request(prompts[i], **options))).choices[0]
    ids, text = choice.token_ids, choice.text
    different = tally.near_ties + len(tally.wrong)
    compare(tally, kind, expected, ids, text, choice.logprobs.tokens)
    if tally.near_ties + len(tally.wrong) != different:
        return
    if kind == "stop string":
        right = text == expected.text[: expected.text.index(options["stop"])] and choice.finish_reason == "stop"
    else:
        right = len(ids) == options["max_tokens"] and choice.finish_reason == "length"
    if not right:
        tally.wrong.append(f"{kind}: {options} gave {text!r} ({choice.finish_reason}) for {expected.text!r}")


async def load(
    server: Server, prompts: list[list[int]], answers: list[Answer], seconds: float
) -> tuple[Tally, dict[str, Memory]]:
    """Run clients without a pause; return what they saw, and the memory of the server's processes meanwhile.

    Raises:
        EngineError: the server ended.
    """
    tally = Tally()
    start = time.monotonic()
    assert server.process is not None
    processes = {"server": psutil.Process(server.process.pid)}
    for process in family(server.process.pid):
        if (name := " ".join(process.cmdline())).startswith("VLLM::"):
            processes[name.removeprefix("VLLM::").strip()] = process
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in processes}

    async def client_loop(client: openai.AsyncOpenAI, seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < start + seconds and len(tally.errors) < MANY:
            try:
                await ask(client, rng, prompts, answers, tally)
            except (openai.OpenAIError, httpx.HTTPError) as error:
                tally.errors.append(repr(error))

    async def watch() -> None:
        while True:
            for name, process in processes.items():
                try:
                    samples[name].append((time.monotonic() - start, process.memory_info().rss / 1e6))
                except psutil.Error:
                    tally.errors.append(f"the process {name} is gone")
                    return
            await asyncio.sleep(1)

    async with client_of(server) as client:
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(client_loop(client, seed) for seed in range(CLIENTS)))
        watching.cancel()
    if len(tally.errors) >= MANY:
        raise EngineError(f"{tally.errors[0]} {last_words(server.log)}")
    return tally, {
        name: Memory(start=found[0][1], end=found[-1][1], slope_per_minute=60 * line(found))
        for name, found in samples.items()
    }


def family(pid: int) -> list[psutil.Process]:
    """Return a process and all processes that it started."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def counters(server: Server) -> dict[str, float]:
    """Return the server's own counters, summed over their labels."""
    text = httpx.get(f"{server.url}/metrics", timeout=30).raise_for_status().text
    totals: Counter[str] = Counter()
    for metric in text_string_to_metric_families(text):
        for sample in metric.samples:
            totals[sample.name] += sample.value
    return totals


def drained(server: Server, patience: float = 30) -> int:
    """Return how many requests the server still has, after waiting for it to drop those whose clients hung up."""
    deadline = time.monotonic() + patience
    while (
        left := int(counters(server)["vllm:num_requests_running"] + counters(server)["vllm:num_requests_waiting"])
    ) > 0:
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)  # a server has no event for it, only counters
    return left


def line(samples: list[tuple[float, float]]) -> float:
    """Return the slope of a straight line through the second half of the points."""
    late = torch.tensor(samples[len(samples) // 2 :], dtype=torch.float64)
    x, y = late.T - late.mean(0)[:, None]
    return float((x * y).sum() / (x * x).sum())


def soak(target: Path, drafter: Path, seeds: list[list[int]], seconds: float, work: Path) -> Soak:
    """Run the reference, the load and the comparison, as the top of this file describes, and return the results."""
    prompts = make_prompts(seeds)
    with Server(target, OPTIONS, log=work / "alone.log", env=ENVIRONMENT) as server:
        answers = asyncio.run(reference(server, prompts))
        alone, memory_alone = asyncio.run(load(server, prompts, answers, seconds * 2 / 5))
    speculative = json.dumps({"method": "eagle3", "model": str(drafter), "num_speculative_tokens": K})
    arguments = [*OPTIONS, *CACHE, "--speculative-config", speculative]
    with Server(target, arguments, log=work / "drafted.log", env=ENVIRONMENT) as server:
        assert server.process is not None
        asyncio.run(load(server, prompts, answers, min(seconds / 5, 30)))  # buffers grow to their size
        start = time.monotonic()
        tally, memory = asyncio.run(load(server, prompts, answers, seconds * 3 / 5))
        seconds = time.monotonic() - start
        left, acceptance, numbers = drained(server), from_server(server.url), counters(server)
        processes = family(server.process.pid)
    _, left_processes = psutil.wait_procs(processes, timeout=10)
    tally.wrong += [f"without a drafter: {words}" for words in alone.wrong]
    tally.errors += [f"without a drafter: {words}" for words in alone.errors]
    for problem in [*tally.wrong[:20], *tally.errors[:20]]:
        print(problem, file=sys.stderr)
    return Soak(
        **provenance(),
        device="cpu",
        seconds=seconds,
        clients=CLIENTS,
        requests=dict(tally.requests),
        tokens=tally.tokens,
        wrong=len(tally.wrong),
        errors=len(tally.errors),
        near_ties=tally.near_ties,
        preemptions=int(numbers["vllm:num_preemptions_total"]),
        prefix_cache_hits=int(numbers["vllm:prefix_cache_hits_total"]),
        acceptance_length=acceptance.length,
        memory=memory,
        memory_alone=memory_alone,
        left_running=left,
        left_processes=len(left_processes),
    )


def growth(result: Soak, name: str) -> float:
    """Return the growth of a process in MB per minute, minus its growth under the target alone."""
    alone = result.memory_alone[name].slope_per_minute if name in result.memory_alone else 0.0
    return result.memory[name].slope_per_minute - max(alone, 0.0)


def failures(result: Soak) -> list[str]:
    """Return a sentence for each condition of a good run that this run does not meet."""
    return [
        words
        for bad, words in (
            (result.wrong > 0, f"{result.wrong} answers are not the target's"),
            (result.errors > 0, f"{result.errors} requests got an error"),
            (result.near_ties > NEAR_TIES_ALLOWED * result.tokens, f"{result.near_ties} near ties"),
            (result.preemptions == 0, "nothing was preempted"),
            (result.prefix_cache_hits == 0, "no prefix was found in the cache"),
            (result.acceptance_length < 1.2, f"acceptance length {result.acceptance_length:.2f}"),
            (set(result.requests) != set(KINDS), f"only {sorted(result.requests)} were asked"),
            *(
                (
                    result.seconds >= LONG and growth(result, name) > FLAT,
                    f"the memory of the {name} grows {growth(result, name):.1f} MB a minute more than without drafter",
                )
                for name in result.memory
            ),
            (result.left_running > 0, f"{result.left_running} requests were left"),
            (result.left_processes > 0, f"{result.left_processes} processes were left"),
        )
        if bad
    ]


def pair_in(folder: Path) -> tuple[Path, Path, list[list[int]]]:
    """Return the trained pair of the engine tests in ``folder``, and train it first if it does not exist."""
    prompts = folder / "prompts.pt"
    if not prompts.is_file():
        from pairs import make_pair

        torch.save(make_pair(folder).prompts, prompts)
    return folder / "target", folder / "drafter", torch.load(prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="duration of the load in seconds (default: 600)")
    parser.add_argument(
        "--pair",
        type=Path,
        default=Path("build/soak/pair"),
        help="folder of the target and the drafter, which are trained there if it does not exist",
    )
    parser.add_argument("--json", type=Path, help="JSON file to write the results to")
    arguments = parser.parse_args()
    result = soak(*pair_in(arguments.pair), arguments.seconds, arguments.pair.parent)
    print(result.model_dump_json(indent=1, by_alias=True))
    if words := failures(result):
        sys.exit(f"error: {'; '.join(words)}")
    if arguments.json:
        result.write(arguments.json)


if __name__ == "__main__":
    main()
