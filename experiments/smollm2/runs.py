"""Summarize the runs whose steps `runs/` keeps: what was measured on held-out answers after each epoch.

python experiments/smollm2/runs.py --json docs/results/smollm2-runs.json
"""

import argparse
import json
from pathlib import Path

import torch
from pydantic import BaseModel

from vllm_slimspec.common.device import device_name
from vllm_slimspec.common.output import claim_file
from vllm_slimspec.measure.results import Results, provenance

RUNS = Path(__file__).parent / "runs"


class Run(BaseModel):
    """One run of `slimspec train fit`; the lists have an entry for each evaluation."""

    run: str
    steps: list[int]
    train_loss: list[float]  # mean over the steps since the evaluation before
    loss: list[float]
    length: list[float]  # acceptance length at K = 3
    low: list[float]  # of its 95% interval over documents
    high: list[float]


class RunResults(Results):
    """All of them."""

    kind: str = "runs"
    rows: list[Run]


def summarize(file: Path) -> Run:
    """Return the evaluations of one metrics.jsonl."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    held_out = [line for line in lines if line["split"] == "held-out"]
    trained = [line for line in lines if line["split"] == "train"]
    train_loss, before = [], 0
    for evaluation in held_out:
        part = [line["loss"] for line in trained if before <= line["step"] < evaluation["step"]]
        train_loss.append(round(sum(part) / len(part), 4))
        before = evaluation["step"]
    columns = {name: [round(line[name], 4) for line in held_out] for name in ("loss", "length", "low", "high")}
    return Run(run=file.stem, steps=[line["step"] for line in held_out], train_loss=train_loss, **columns)


def main() -> None:
    parser = argparse.ArgumentParser(description="Summarize the kept runs.")
    parser.add_argument("--json", type=Path, required=True, help="the file to write")
    arguments = parser.parse_args()
    with claim_file(arguments.json):
        rows = [summarize(file) for file in sorted(RUNS.glob("*.jsonl"))]
        RunResults(**provenance(), device=device_name(torch.device("cpu")), rows=rows).write(arguments.json)


if __name__ == "__main__":
    main()
