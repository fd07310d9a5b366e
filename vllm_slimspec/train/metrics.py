"""Record a run: one line of JSON for every step and every evaluation, and a picture of them.

    {"split": "train", "step": 7, "epoch": 0, "loss": ..., "by_place": [...], "lr": ..., "tokens_per_s": ...}
    {"split": "held-out", "step": 230, "epoch": 0, "loss": ..., "by_place": [...], "alpha": [...],
     "length": ..., "low": ..., "high": ..., "accepted": [...], "cycles": ..., "documents": ...}
    {"split": NAME, "step": 230, "epoch": 0, "length": ..., ...}, of the documents in another folder

docs/training.md says what the keys mean.
"""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from vllm_slimspec.common.output import write_whole
from vllm_slimspec.common.walk import acceptance_length

METRICS = "speculators.metrics"  # the logger that speculators reports to


class MetricsFile(logging.Handler):
    """Write what speculators reports to a file, one line each.

    Lines that were written after the checkpoint from which this run resumes, that of ``step``, are removed. ``decay``
    is the factor by which speculators weights the loss of each further position.
    """

    def __init__(self, file: Path, step: int, decay: float) -> None:
        super().__init__(logging.INFO)
        self.decay = decay
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(file) if line["step"] < step + (line["split"] != "train")]
        write_whole(file, lambda part: part.write_text("".join(json.dumps(line) + "\n" for line in kept)))
        self._file = file.open("a", buffering=1)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line if the record reports a training step."""
        report: Any = record.msg
        if isinstance(report, Mapping) and "train" in report:
            measured = measure_places(report["train"], self.decay)
            speed = {"lr": report["lr"], "tokens_per_s": report["profile"]["tokens_per_s"]}
            self.write({"split": "train", "step": record.step, "epoch": report["epoch"], **measured, **speed})  # type: ignore[attr-defined]

    def write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self._file.close()
        super().close()


def measure_cycles(counts: np.ndarray) -> dict[str, Any]:
    """Return the keys that describe cycles, from their counts, int64 [documents, K + 1] (see common.walk)."""
    length, (cycles, *accepted) = acceptance_length(counts), counts.sum(0).tolist()
    return {
        "length": length.value,
        "low": length.low,
        "high": length.high,
        "accepted": [number / cycles for number in accepted],
        "cycles": cycles,
        "documents": int(np.count_nonzero(counts[:, 0])),
    }


def measure_places(report: Mapping[str, float], decay: float) -> dict[str, Any]:
    """Return the keys that describe a report of speculators, which weights position i of a loss by decay**i."""

    def by_position(name: str) -> list[float]:
        names = (f"{name}_{position}" for position in count())
        return [metrics[key] for key in takewhile(metrics.__contains__, names)]

    metrics = {name.removesuffix("_epoch"): value for name, value in report.items()}
    found: dict[str, Any] = {"loss": metrics["loss"], "by_place": by_position("full_acc")}
    if distance := by_position("tv_loss"):
        found["alpha"] = [1 - d / decay**position for position, d in enumerate(distance)]
    return found


def describe(measured: Mapping[str, Any]) -> str:
    """Return one line of text about what :func:`measure_cycles` found."""
    rates = " ".join(f"{rate:.2f}" for rate in measured["accepted"])
    return (
        f"acceptance length {measured['length']:.2f} (95%: {measured['low']:.2f} to {measured['high']:.2f}) at "
        f"K = {len(measured['accepted'])}, accepted by position {rates}; {measured['cycles']} cycles through "
        f"{measured['documents']} documents"
    )


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file, without one that a kill has left unfinished. A missing file has no lines."""
    lines = []
    for line in file.read_text().splitlines() if file.exists() else ():
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def plot_metrics(file: Path, output: Path) -> None:
    """Draw the loss, and the held-out acceptance length with its interval, over the steps of a run."""
    from matplotlib.figure import Figure

    lines = read_metrics(file)
    # Version 0.1.0 wrote a mean over places under the key "length", without an interval.
    walked = [line for line in lines if "low" in line]

    def series(lines: list[dict[str, Any]], split: str, name: str) -> tuple[list[int], list[float]]:
        own = [line for line in lines if line["split"] == split]
        return [line["step"] for line in own], [line[name] for line in own]

    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    loss, length = figure.subplots(1, 2)
    loss.plot(*series(lines, "train", "loss"), color="0.7", linewidth=1, label="training")
    loss.plot(*series(lines, "held-out", "loss"), color="C0", marker="o", markersize=4, label="held out")
    loss.set_ylabel("loss")
    for split in dict.fromkeys(line["split"] for line in walked):
        steps, lengths = series(walked, split, "length")
        (curve,) = length.plot(steps, lengths, marker="o", markersize=4, label=split)
        low, high = (series(walked, split, bound)[1] for bound in ("low", "high"))
        length.fill_between(steps, low, high, color=curve.get_color(), alpha=0.2, linewidth=0)
    length.set_ylabel("acceptance length")
    for axes in (loss, length):
        axes.legend(frameon=False)
        axes.set_xlabel("optimizer steps")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=160)
