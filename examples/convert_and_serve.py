"""A dense EAGLE-3 drafter made low-rank in six ways, each served by vLLM: what conversion costs, measured.

    python examples/convert_and_serve.py build/convert --json docs/results/convert-tiny.json

Builds the tiny target of tiny_target.py if it is not there, trains a dense drafter for it, records head states while
the target answers prompts, and then converts and serves. Every drafter answers the same held-out prompts; the
acceptance length is counted by the engine, and beside it stands what `slimspec convert` had predicted from the head
states alone.

Expected output: a table whose last row, distilled and re-ranked, is within a few percent of the dense head, and "all
answers are the target's own". At a rank of only 16 the tiny drafter loses far more without re-ranking than a real one.
"""

import argparse
import gc
import json
import os
import platform
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the counters are read from this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import tiny_pair
import tiny_target
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from vllm_slimspec.bench.acceptance import from_engine
from vllm_slimspec.bench.results import Results, provenance
from vllm_slimspec.convert.collect import collect
from vllm_slimspec.convert.distil import Recipe
from vllm_slimspec.convert.evaluate import Tau
from vllm_slimspec.convert.run import Options, convert
from vllm_slimspec.train.launch import fit
from vllm_slimspec.train.states import read_documents, write_states

K, TOKENS = 3, 32
CALIBRATION = 512  # prompts
ENGINE: dict[str, Any] = {
    "dtype": "float32",  # so that equality of answers is exact
    "max_model_len": 256,
    "max_num_seqs": 64,
    "enable_prefix_caching": False,
    "disable_log_stats": False,
}


class Served(BaseModel):
    """One drafter in the engine, and how it was expected to do."""

    head: str
    length: float
    predicted: float | None
    same: bool  # as the target alone answers


class Conversions(Results):
    """What ``--json`` writes."""

    kind: Literal["convert"] = "convert"
    k: int
    rows: list[Served]


def dense_drafter(folder: Path, target: Path) -> Path:
    """A drafter with a dense head, trained on the documents and by the recipe of the tiny pair's low-rank one."""
    drafter, work = folder / "dense-drafter", folder / "dense-work"
    if not drafter.exists():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        tiny_pair.write_documents(target, work / "documents.jsonl")
        write_states(target, read_documents(work / "documents.jsonl", target, max_length=128), work / "states")
        fit(target, work / "states", work / "drafter", head="dense", **tiny_pair.RECIPE)
        (work / "drafter").rename(drafter)
        shutil.rmtree(work)
    return drafter


def write_calibration(folder: Path, target: Path) -> Path:
    """Prompts from files that the measured prompts are not from."""
    file = folder / "calibration.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(target)
    ids = tiny_target.encode(tokenizer, tiny_target.corpus(held_out=False))
    windows = tiny_target.windows(ids, CALIBRATION, tiny_pair.PROMPT_TOKENS, seed=3)
    file.write_text("".join(json.dumps({"input_ids": window.tolist()}) + "\n" for window in windows))
    return file


def serve(target: Path, drafter: Path | None, prompts: list[str]) -> tuple[list[list[int]], float]:
    """Greedy answers, and the engine's acceptance length (1 without a drafter)."""
    from vllm import LLM, SamplingParams

    options = dict(ENGINE)
    if drafter is not None:
        options["speculative_config"] = {"method": "eagle3", "model": str(drafter), "num_speculative_tokens": K}
    llm = LLM(model=str(target), enforce_eager=True, **options)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True), use_tqdm=False)
    length = 1.0 if drafter is None else from_engine(llm).length
    del llm
    gc.collect()
    return [list(output.outputs[0].token_ids) for output in outputs], length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--distil-steps", type=int, default=400)
    args = parser.parse_args()

    target = args.folder / "target"
    if not (target / "model.safetensors").exists():
        tiny_target.build(target)
    tiny_pair.write_prompts(target, args.folder / "prompts.jsonl")
    prompts = [json.loads(line)["prompt"] for line in (args.folder / "prompts.jsonl").read_text().splitlines()]
    dense = dense_drafter(args.folder, target)
    states = args.folder / "head-states"
    calibration = write_calibration(args.folder, target)
    collect(target, dense, calibration, states, k=K, max_tokens=TOKENS, engine=ENGINE)

    base = Options(str(dense), args.folder / "converted", str(target), force=True)
    ways: dict[str, dict[str, Any]] = {
        "plain SVD": {},
        "weighted": {"hidden_states": states},
        "weighted + distilled": {"hidden_states": states, "distil": Recipe(args.distil_steps)},
        "weighted + rerank 16": {"hidden_states": states, "rerank": 16},
        "weighted + rerank 32": {"hidden_states": states, "rerank": 32},
        "weighted + distilled + rerank 16": {
            "hidden_states": states,
            "distil": Recipe(args.distil_steps),
            "rerank": 16,
        },
    }
    expected, _ = serve(target, None, prompts)
    answers, length = serve(target, dense, prompts)
    served = [Served(head="dense", length=length, predicted=None, same=answers == expected)]
    for name, way in ways.items():
        shutil.rmtree(base.output, ignore_errors=True)
        done = convert(replace(base, **way))
        answers, length = serve(target, base.output, prompts)
        if done.evaluation is not None:
            served[0].predicted = _value(done.evaluation.dense_tau)
        tau = None if done.outcome.quality is None else done.outcome.quality.tau
        served.append(Served(head=name, length=length, predicted=_value(tau), same=answers == expected))
    report(served, args.json)


def _value(tau: Tau | None) -> float | None:
    return None if tau is None else tau.value


def report(served: list[Served], file: Path | None) -> None:
    """The table, and the same as JSON."""
    dense = served[0].length
    table = Table("head", "acceptance length in vLLM", "of dense", "predicted from states", box=None)
    for s in served:
        predicted = f"{s.predicted:.2f}" if s.predicted else "-"
        table.add_row(s.head, f"{s.length:.2f}", f"{s.length / dense:.1%}", predicted)
    console = Console()
    console.print(table)
    same = all(s.same for s in served)
    console.print("all answers are the target's own" if same else "some answers are NOT the target's own", style="bold")
    if file is not None:
        Conversions(k=K, rows=served, device=f"{platform.machine()} CPU", **provenance()).write(file)


if __name__ == "__main__":
    main()
