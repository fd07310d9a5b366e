"""A dense EAGLE-3 drafter made low-rank in every way there is, each served by vLLM: what conversion costs, measured.

    python examples/convert_and_serve.py build/convert --json docs/results/convert-tiny.json

Builds the tiny target of tiny_target.py if it is not there, trains a dense drafter for it, records head states while
the target answers prompts, and then converts and serves. Every drafter answers the same held-out prompts; the
acceptance length is counted by the engine, and beside it stands what `slimspec convert` had predicted from the head
states alone. A part that is done stays done: stop it when you like and run it again.

Expected output: a table in which the best re-ranked head is within 4% of the dense one and the distilled one within 7%,
and "all answers are the target's own". At a rank of only 16 the tiny drafter loses far more untrained than a real one.
"""

import argparse
import gc
import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the counters are read from this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # this process trains as well, with all threads

import tiny_pair
import tiny_target
import torch
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

import vllm_slimspec
from vllm_slimspec.bench.acceptance import from_engine
from vllm_slimspec.bench.head import device_name
from vllm_slimspec.bench.options import claim_results
from vllm_slimspec.bench.results import Results, provenance
from vllm_slimspec.console import one_line_errors
from vllm_slimspec.convert.collect import collect
from vllm_slimspec.convert.distil import Recipe
from vllm_slimspec.convert.evaluate import RERANK
from vllm_slimspec.convert.joint import JointRecipe
from vllm_slimspec.convert.run import Conversion, Options, convert
from vllm_slimspec.train.documents import read_documents
from vllm_slimspec.train.launch import fit
from vllm_slimspec.train.states import write_states

K, TOKENS = 3, 32
CALIBRATION, ANSWER_TOKENS = 512, 64  # prompts, and tokens of each answer
ENGINE: dict[str, Any] = {
    "dtype": "float32",  # so that equality of answers is exact
    "max_model_len": 256,
    "max_num_seqs": 64,
    "enable_prefix_caching": False,
    "disable_log_stats": False,
}


# Like the recipe of the tiny pair: large steps, because there are few.
JOINT: dict[str, Any] = {
    key: value for key, value in tiny_pair.RECIPE.items() if key not in ("epochs", "lr", "scheduler_warmup_steps")
} | {"muon_lr": 0.006}
# Whatever a measurement follows from, besides the drafter.
_SOURCES = sorted((Path(vllm_slimspec.__file__).parent / "convert").glob("*.py"))


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


def training_states(folder: Path, target: Path) -> Path:
    """The target's states over the documents of the tiny pair, half a gigabyte."""
    documents, states = folder / "documents.jsonl", folder / "train-states"
    if not documents.exists():
        part = documents.with_suffix(".part")
        tiny_pair.write_documents(target, part)
        part.rename(documents)
    write_states(target, read_documents(documents, target, max_length=128), states, dtype="float32")
    return states


def dense_drafter(folder: Path, target: Path) -> Path:
    """A drafter with a dense head, trained by the recipe of the tiny pair's low-rank one."""
    drafter = folder / "dense-drafter"
    if not drafter.exists():
        fit(target, training_states(folder, target), drafter, head="dense", **tiny_pair.RECIPE)
    return drafter


def write_calibration(folder: Path, target: Path) -> Path:
    """Prompts from files that the measured prompts are not from."""
    file = folder / "calibration.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(target)
    ids = tiny_target.encode(tokenizer, tiny_target.corpus(held_out=False))
    windows = tiny_target.windows(ids, CALIBRATION, tiny_pair.PROMPT_TOKENS, seed=3)
    file.write_text("".join(json.dumps({"input_ids": window.tolist()}) + "\n" for window in windows))
    return file


def record_states(folder: Path, target: Path, dense: Path) -> Path:
    """Head states of the dense drafter over the target's answers."""
    states = folder / "states"
    calibration = write_calibration(folder, target)
    collect(target, dense, calibration, states, k=K, max_tokens=ANSWER_TOKENS, max_states=10**6, engine=ENGINE)
    return states


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


def ways(states: Path, data: Path, head_steps: int, joint_steps: int) -> dict[str, dict[str, Any]]:
    """Name -> how to convert; ``data`` is what the dense drafter was trained on, four times the recorded answers."""
    weighted: dict[str, Any] = {"hidden_states": states}
    distilled = {**weighted, "distil": Recipe(head_steps)}
    joint = JointRecipe(joint_steps, lr=4e-3, flags=JOINT)
    kl = {"distil": Recipe(head_steps, "kl")}
    return {
        "plain SVD": {},
        "weighted": weighted,
        "weighted + distilled head, kl": {**weighted, **kl},
        "weighted + distilled head": distilled,
        "weighted + distilled jointly, kl": {**weighted, "joint": replace(joint, loss="kl")},
        "weighted + distilled jointly": {**weighted, "joint": joint},
        "weighted + distilled head, then jointly on more": {
            **distilled,
            "joint": replace(joint, steps=2 * joint_steps, data=str(data)),
        },
        **{f"weighted + rerank {k}": {**weighted, "rerank": k} for k in RERANK if k >= 16},
        "weighted + distilled head + rerank 16": {**distilled, "rerank": 16},
    }


def compare(
    folder: Path, target: Path, dense: Path, prompts: list[str], ways: dict[str, dict[str, Any]]
) -> list[Served]:
    """Serve the dense drafter and every conversion of it; what was measured before is not measured again."""
    base = Options(str(dense), folder / "converted", str(target), force=True, engine=ENGINE)
    alone = folder / "measured" / "alone.json"
    key = tiny_pair.hashed([*_SOURCES, dense / "model.safetensors"], repr(prompts))
    tiny_pair.once(alone, key, lambda: _save(alone, serve(target, None, prompts)[0]))
    expected = json.loads(alone.read_text())

    def measure(name: str, file: Path) -> None:
        shutil.rmtree(base.output, ignore_errors=True)
        predicted, drafter = None, dense
        if name in ways:
            quality, drafter = convert(replace(base, **ways[name])).outcome.quality, base.output
            predicted = quality.tau.value if quality and quality.tau else None
        elif (found := Conversion(replace(base, hidden_states=folder / "states")).evaluate({})) and found.dense_tau:
            predicted = found.dense_tau.value
        answers, length = serve(target, drafter, prompts)
        _save(file, Served(head=name, length=length, predicted=predicted, same=answers == expected).model_dump())

    served = []
    for name in ("dense", *ways):
        file = folder / "measured" / f"{name.replace(', ', '-').replace(' ', '-')}.json"
        tiny_pair.once(file, f"{key} {ways.get(name)}", partial(measure, name, file))
        served.append(Served.model_validate_json(file.read_text()))
    return served


def _save(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--head-steps", type=int, default=400)
    parser.add_argument("--joint-steps", type=int, default=150)
    args = parser.parse_args()

    target = args.folder / "target"
    with claim_results(args.json):
        if not (target / "model.safetensors").exists():
            tiny_target.build(target)
        tiny_pair.write_prompts(target, args.folder / "prompts.jsonl")
        dense = dense_drafter(args.folder, target)
        states = record_states(args.folder, target, dense)
        data = training_states(args.folder, target)
        prompts = tiny_pair.read_prompts(args.folder / "prompts.jsonl")
        tried = ways(states, data, args.head_steps, args.joint_steps)
        report(compare(args.folder, target, dense, prompts, tried), args.json)


def report(served: list[Served], file: Path | None) -> None:
    """The table, and the same as JSON."""
    dense = served[0].length
    table = Table("head", "acceptance length in vLLM", "of dense", "predicted from states", box=None)
    for s in served:
        predicted = f"{s.predicted:.2f}" if s.predicted else "-"
        table.add_row(s.head, f"{s.length:.2f}", f"{s.length / dense:.1%}", predicted)
    console = Console()
    console.print(table)
    best = max((s for s in served if " rerank " in s.head and "distilled" not in s.head), key=lambda s: s.length)
    console.print(f"best without training: {best.head}, {best.length / dense:.1%} of dense")
    same = all(s.same for s in served)
    console.print("all answers are the target's own" if same else "some answers are NOT the target's own", style="bold")
    if file is not None:
        Conversions(k=K, rows=served, device=device_name(torch.device("cpu")), **provenance()).write(file)


if __name__ == "__main__":
    with one_line_errors():
        main()
