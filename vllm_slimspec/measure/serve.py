"""``slimspec bench serve``: run vLLM's own load generator against a server for each drafter."""

import gc
import json
import logging
import os
import shutil
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from vllm_slimspec.common.device import device_name
from vllm_slimspec.common.process import last_words
from vllm_slimspec.common.progress import progress
from vllm_slimspec.engine.server import Server
from vllm_slimspec.errors import EngineError
from vllm_slimspec.measure.compare import read_sets
from vllm_slimspec.measure.results import ServeResults, ServeRow, provenance
from vllm_slimspec.target import Target

logger = logging.getLogger(__name__)

_WARM_UP = 2  # uncounted requests for each one that runs at the same time, in the first round
_ROOM = 1.5  # memory that serving needs, in multiples of the target's weights: the drafter, the cache and the rest


@dataclass(frozen=True)
class Pair:
    """A target, its drafters, and the prompts that they answer."""

    target: str
    drafters: Mapping[str, str]  # name of the head -> folder or Hugging Face id
    prompts: Path  # JSONL
    server: Sequence[str] = ()  # further arguments of `vllm serve`
    # name of the head -> further keys of vLLM's speculative_config
    speculative: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """The options of ``slimspec bench serve``."""

    pair: Pair
    k: int  # draft tokens per cycle
    concurrencies: Sequence[int]  # numbers of requests that run at the same time
    requests: int  # number of requests for each one that runs at the same time
    max_tokens: int  # exact number of tokens of each answer
    dtypes: Sequence[str] | None = None  # None: chosen by dtypes_of
    rounds: int | None = None  # times that all servers take turns; None: a server ends before the next one starts


def dtypes_of(pair: Pair) -> Sequence[str | None]:
    """Return the dtypes to serve a pair in by default; None stands for vLLM's own choice, or that of the arguments."""
    if torch.accelerator.is_available() or any(argument.startswith("--dtype") for argument in pair.server):
        return (None,)
    return fitting(pair.target)


def fitting(target: str | Path) -> list[str]:
    """Return the dtypes to measure a target in on a CPU: both, or bfloat16 if float32 does not fit into memory.

    A single request waits for memory, so that bfloat16 should be faster even on a processor that emulates it. The cost
    of emulation differs between processors, however, so that both are measured.
    """
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(str(target), trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    needed, there = _ROOM * 4 * sum(p.numel() for p in model.parameters()), psutil.virtual_memory().available
    if needed <= there:
        return ["bfloat16", "float32"]
    logger.warning(
        "%s: is not timed in float32, which would need about %.0f GB of memory; %.0f GB are free; to time it all the "
        "same, give --dtypes float32",
        target,
        needed / 1e9,
        there / 1e9,
    )
    return ["bfloat16"]


def measure(options: Options) -> Iterator[ServeResults]:
    """Serve the target alone and with each drafter, under the same load, and yield all results so far each time.

    Raises:
        CheckpointError: a prompt is bad.
        ImportError: pandas, which the load generator needs, is not installed.
        EngineError: a server or the load generator failed; the message names the log.
    """
    if find_spec("pandas") is None:
        raise ImportError("`vllm bench serve` needs pandas; pip install 'vllm-slimspec[bench]'")
    pair = options.pair
    target = Target.open(pair.target)
    room = options.max_tokens + options.k
    (prompt_set, prompts), *_ = read_sets([pair.prompts], target, max_model_len=None, room=room).items()
    tokenizer = AutoTokenizer.from_pretrained(pair.target, trust_remote_code=False)
    work = Path(tempfile.mkdtemp(prefix="slimspec-"))
    # The load generator sends text, and the server's tokenizer adds the first token (bos) again. So it is removed here.
    texts = [tokenizer.decode(ids[ids[0] == tokenizer.bos_token_id :], skip_special_tokens=False) for ids in prompts]
    data = work / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    rows: list[ServeRow] = []
    every = ["none", *pair.drafters]
    groups = [[name] for name in every] if options.rounds is None else [every]
    for dtype, group in product(options.dtypes or dtypes_of(pair), groups):
        done = list(rows)
        saved: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
        with ExitStack() as running:
            servers = {}
            for name in group:
                with progress(f"Starting {_words(name, dtype)}"):
                    log = work / f"{name}-{dtype}.log"
                    servers[name] = running.enter_context(_server(options, name, dtype, log))
            for turn in range(options.rounds or 1):
                # Each round begins with another server, so that no head is always measured after the same one.
                first = turn * len(group) // (options.rounds or 1)
                for concurrency, name in product(options.concurrencies, group[first:] + group[:first]):
                    with progress(f"Load on {_words(name, dtype)}, {concurrency} at once"):
                        saved[name, concurrency].append(_load(options, servers[name], data, concurrency, work, turn))
                pairs = product(group, options.concurrencies)
                rows = done + [row(name, concurrency, saved[name, concurrency], dtype) for name, concurrency in pairs]
                yield ServeResults(
                    **provenance(target),
                    device=device_name(torch.accelerator.current_accelerator() or torch.device("cpu")),
                    prompt_set=prompt_set,
                    num_speculative_tokens=options.k,
                    max_tokens=options.max_tokens,
                    rows=list(rows),
                )
    shutil.rmtree(work)


def _words(name: str, dtype: str | None) -> str:
    return f"vllm serve, drafter {name}" + (f", {dtype}" if dtype else "")


def _server(options: Options, name: str, dtype: str | None, log: Path) -> Server:
    """Return a server for the target alone, if the name is "none", or with the drafter of this name."""
    pair = options.pair
    arguments = ["--served-model-name", "target", "--no-enable-prefix-caching", *pair.server]
    arguments += [] if dtype is None else ["--dtype", dtype]
    if name in pair.drafters:
        speculative = {"method": "eagle3", "model": pair.drafters[name], "num_speculative_tokens": options.k}
        arguments += ["--speculative-config", json.dumps({**speculative, **pair.speculative.get(name, {})})]
    return Server(pair.target, arguments, log=log, timeout=1200)


def _load(options: Options, server: Server, data: Path, concurrency: int, work: Path, turn: int) -> dict[str, Any]:
    """Run the load generator of `vllm bench serve` at one concurrency, and return the JSON object that it saved.

    It runs in this process. A process of its own would take longer to start than a short load lasts. Each round draws
    other questions, the same for every server.
    """
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    result, log = work / "result.json", work / f"load-{concurrency}.log"
    count = concurrency * options.requests
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    arguments = parser.parse_args(
        [
            *("--backend", "openai", "--base-url", server.url, "--model", "target"),
            *("--tokenizer", options.pair.target, "--dataset-name", "custom", "--dataset-path", str(data)),
            *("--skip-chat-template", "--custom-output-len", str(options.max_tokens), "--ignore-eos"),
            *("--seed", str(turn), "--num-prompts", str(count)),
            *("--num-warmups", str(0 if turn else _WARM_UP * concurrency)),
            *("--max-concurrency", str(concurrency), "--temperature", "0", "--disable-tqdm"),
            *("--percentile-metrics", "ttft,itl,tpot", "--metric-percentiles", "50,80"),
            *("--save-result", "--result-dir", str(work), "--result-filename", result.name),
        ]
    )
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, server.client_cores)
    try:
        with log.open("w") as output, redirect_stdout(output):
            main(arguments)
    except Exception as error:
        raise EngineError(f"vllm bench serve: {type(error).__name__}: {error} {last_words(log)}") from error
    finally:
        os.sched_setaffinity(0, cores)
        gc.unfreeze()  # The generator freezes all objects, which Triton would report as leaked when Python ends.
    saved = json.loads(result.read_text())
    result.unlink()
    if not saved["completed"]:
        raise EngineError(f"vllm bench serve: none of {count} requests was completed {last_words(log)}")
    return saved


def row(head: str, concurrency: int, rounds: Sequence[Mapping[str, Any]], dtype: str | None = None) -> ServeRow:
    """Return a result row made from what ``vllm bench serve --save-result`` wrote in each round.

    Times are the medians of those of the rounds.
    """

    def total(key: str) -> float:
        return sum(saved[key] for saved in rounds)

    times = {
        f"{time}_ms_{p}": statistics.median(saved[f"{p}_{time}_ms"] for saved in rounds)
        for time, p in product(("ttft", "itl", "tpot"), ("p50", "p80"))
    }
    drafted = "spec_decode_acceptance_length" in rounds[0]
    return ServeRow(
        head=head,
        dtype=dtype,
        concurrency=concurrency,
        completed=int(total("completed")),
        failed=int(total("failed")),
        output_tokens=int(total("total_output_tokens")),
        duration_s=total("duration"),
        tokens_per_s=total("total_output_tokens") / total("duration"),
        rounds_tokens_per_s=[saved["output_throughput"] for saved in rounds],
        **times,
        length=1 + total("spec_decode_accepted_tokens") / total("spec_decode_num_drafts") if drafted else None,
    )
