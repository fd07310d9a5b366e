"""How a run goes: every step and every evaluation as a line of JSON, and a picture of them.

    {"split": "train", "step": 7, "epoch": 0, "loss": ..., "accepted": [...], "lr": ..., "tokens_per_s": ...}
    {"split": "held-out", "step": 230, "epoch": 0, "loss": ..., "accepted": [...], "alpha": [...], "length": ...}

``accepted`` is the share of places where the drafts at positions 1, 2, ... are all the target's own best tokens, which
is what greedy decoding accepts; ``length`` is the acceptance length that follows, 1 + their sum; ``alpha`` the mean of
sum(min(p, q)) at each position, which is what sampling accepts. The target's own tokens are fed to the drafter.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_slimspec.output import write_whole

METRICS = "speculators.metrics"  # the logger that speculators reports to


class MetricsFile(logging.Handler):
    """What speculators reports, as lines of a file.

    Args:
        file: appended to, without the lines that a run wrote after the checkpoint that is resumed now.
        step: optimiser steps of that checkpoint.
        decay: by which speculators weights the loss of each further position.
    """

    def __init__(self, file: Path, step: int, decay: float) -> None:
        super().__init__(logging.INFO)
        self.decay = decay
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(file) if line["step"] < step + (line["split"] == "held-out")]
        write_whole(file, lambda part: part.write_text("".join(json.dumps(line) + "\n" for line in kept)))
        self._file = file.open("a", buffering=1)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, if the record is a report."""
        report: Any = record.msg
        if isinstance(report, Mapping) and (line := self._line(report, getattr(record, "step", 0))):
            self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()

    def _line(self, report: Mapping[str, Any], step: int) -> dict[str, Any] | None:
        if "train" in report:
            found = {"split": "train", "step": step, "epoch": report["epoch"], **_of(report["train"], self.decay)}
            return found | {"lr": report["lr"], "tokens_per_s": report["profile"]["tokens_per_s"]}
        if "val" in report:
            metrics = {name.removesuffix("_epoch"): value for name, value in report["val"].items()}
            return {"split": "held-out", "step": step, "epoch": report["epoch"], **_of(metrics, self.decay)}
        return None


def _of(metrics: Mapping[str, float], decay: float) -> dict[str, Any]:
    """Our names for speculators' metrics."""
    accepted = _by_position(metrics, "full_acc_{}")
    found: dict[str, Any] = {"loss": metrics["loss"], "accepted": accepted, "length": 1 + sum(accepted)}
    distance = _by_position(metrics, "tv_loss_{}")
    if distance:
        found["alpha"] = [1 - d / decay**position for position, d in enumerate(distance)]
    return found


def _by_position(metrics: Mapping[str, float], name: str) -> list[float]:
    found: list[float] = []
    while (key := name.format(len(found))) in metrics:
        found.append(metrics[key])
    return found


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; one that was torn by a kill is left out, a missing file has none."""
    lines = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def plot_metrics(file: Path, output: Path) -> None:
    """Loss, and the held-out acceptance by position, over the steps of a run."""
    from matplotlib.figure import Figure

    from vllm_slimspec.bench.report.theme import LIGHT, drawing, save_png

    lines = read_metrics(file)
    train, held_out = ([line for line in lines if line["split"] == split] for split in ("train", "held-out"))
    with drawing(LIGHT):
        figure = Figure(figsize=(8.4, 3.2), layout="constrained")
        loss, rates = figure.subplots(1, 2)
        loss.plot(*_series(train, "loss"), color=LIGHT["body"], linewidth=1, label="training")
        loss.plot(*_series(held_out, "loss"), color=LIGHT["low-rank"], marker="o", markersize=4, label="held out")
        loss.set_ylabel("loss")
        loss.legend()
        for position in range(len(held_out[-1]["accepted"]) if held_out else 0):
            steps, accepted = _series(held_out, "accepted", position)
            alpha = 1 - 0.28 * position
            style = {"color": LIGHT["low-rank"], "alpha": max(alpha, 0.2), "marker": "o", "markersize": 4}
            rates.plot(steps, accepted, label=f"{position + 1}", **style)
        rates.set_ylim(0, 1)
        rates.set_ylabel("accepted up to this position, held out")
        if held_out:
            rates.legend(title="position")
        for axes in (loss, rates):
            axes.set_xlabel("optimiser steps")
        save_png(figure, output)


def _series(lines: list[dict[str, Any]], name: str, position: int | None = None) -> tuple[list[int], list[float]]:
    values = [line[name] if position is None else line[name][position] for line in lines]
    return [line["step"] for line in lines], values
