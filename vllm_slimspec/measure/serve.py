"""``slimspec bench serve``: run vLLM's own load generator against a server for each drafter."""

import json
import logging
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from vllm_slimspec.common.device import device_name
from vllm_slimspec.common.process import how_it_ended, last_words
from vllm_slimspec.common.progress import progress
from vllm_slimspec.engine.server import Server, vllm_command
from vllm_slimspec.errors import EngineError
from vllm_slimspec.measure.compare import read_sets
from vllm_slimspec.measure.results import ServeResults, ServeRow, provenance
from vllm_slimspec.target import Target

logger = logging.getLogger(__name__)

_WARM_UP = 2  # uncounted requests for each one that runs at the same time
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
    """Serve the target alone, then with each drafter, under the same load, and yield all results so far each time.

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
    dtypes = options.dtypes or dtypes_of(pair)
    for dtype, (name, drafter) in product(dtypes, {"none": None, **pair.drafters}.items()):
        arguments = ["--served-model-name", "target", "--no-enable-prefix-caching", *pair.server]
        arguments += [] if dtype is None else ["--dtype", dtype]
        if drafter is not None:
            speculative = {"method": "eagle3", "model": drafter, "num_speculative_tokens": options.k}
            arguments += ["--speculative-config", json.dumps({**speculative, **pair.speculative.get(name, {})})]
        server = Server(pair.target, arguments, log=work / f"{len(rows)}-server.log", timeout=1200)
        with ExitStack() as running:
            what = f"vllm serve, drafter {name}" + (f", {dtype}" if dtype else "")
            with progress(f"Starting {what}"):
                running.enter_context(server)
            for concurrency in options.concurrencies:
                with progress(f"Load on {what}, {concurrency} at once"):
                    saved = _load(options, server.url, data, concurrency, work)
                rows.append(row(name, concurrency, saved, dtype))
        yield ServeResults(
            **provenance(target),
            device=device_name(torch.accelerator.current_accelerator() or torch.device("cpu")),
            prompt_set=prompt_set,
            num_speculative_tokens=options.k,
            max_tokens=options.max_tokens,
            rows=list(rows),
        )
    shutil.rmtree(work)


def _load(options: Options, url: str, data: Path, concurrency: int, work: Path) -> dict[str, Any]:
    """Run `vllm bench serve` at one concurrency, and return the JSON object that it saved."""
    result, log = work / "result.json", work / f"load-{concurrency}.log"
    count = concurrency * options.requests
    command = [
        *(vllm_command(), "bench", "serve", "--backend", "openai", "--base-url", url, "--model", "target"),
        *("--tokenizer", options.pair.target, "--dataset-name", "custom", "--dataset-path", str(data)),
        *("--skip-chat-template", "--custom-output-len", str(options.max_tokens), "--ignore-eos"),
        *("--num-prompts", str(count), "--num-warmups", str(_WARM_UP * concurrency)),
        *("--max-concurrency", str(concurrency), "--temperature", "0", "--disable-tqdm"),
        *("--percentile-metrics", "ttft,itl,tpot", "--metric-percentiles", "50,80"),
        *("--save-result", "--result-dir", str(work), "--result-filename", result.name),
    ]
    with log.open("wb") as output:
        process = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT)
    if process.returncode or not result.is_file():
        raise EngineError(f"vllm bench serve {how_it_ended(process.returncode)} {last_words(log)}")
    saved = json.loads(result.read_text())
    result.unlink()
    if not saved["completed"]:
        raise EngineError(f"vllm bench serve: none of {count} requests was completed {last_words(log)}")
    return saved


def row(head: str, concurrency: int, saved: Mapping[str, Any], dtype: str | None = None) -> ServeRow:
    """Return a result row made from what ``vllm bench serve --save-result`` wrote."""
    return ServeRow(
        head=head,
        dtype=dtype,
        concurrency=concurrency,
        completed=saved["completed"],
        failed=saved["failed"],
        output_tokens=saved["total_output_tokens"],
        duration_s=saved["duration"],
        tokens_per_s=saved["output_throughput"],
        **{f"{time}_ms_{p}": saved[f"{p}_{time}_ms"] for time in ("ttft", "itl", "tpot") for p in ("p50", "p80")},
        length=saved.get("spec_decode_acceptance_length"),
    )
