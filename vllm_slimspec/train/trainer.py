"""Extend speculators' trainer by the paper's betas, by checkpoints that survive a kill, and by metrics.

A checkpoint takes the place of the last one only when it is whole. It holds float32 weights and the place in the epoch.
A run that was stopped or killed therefore resumes with the batches and steps of an undisturbed run.
"""

import logging
import shutil
import signal
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from speculators.train.graceful_shutdown import TrainingInterruptedError
from speculators.train.trainer import Trainer, TrainerConfig
from torch.utils.data import DataLoader

from vllm_slimspec.common.large_tensors import return_holes
from vllm_slimspec.common.progress import progress
from vllm_slimspec.train.held_out import gathered, watched
from vllm_slimspec.train.metrics import METRICS, MetricsFile, describe, measure_cycles, measure_places

logger = logging.getLogger(__name__)

BETAS = (0.9, 0.95)
# A checkpoint of a real drafter has gigabytes, on which an epoch over few documents must not spend its time.
_STEPS_BETWEEN_CHECKPOINTS = 100
_UNFINISHED, _REPLACED = ".unfinished", ".replaced"


class _AllSteps(Exception):
    """All of ``max_steps`` are done."""


class SlimSpecTrainer(Trainer):
    """The trainer of speculators with the changes of this module. It also runs without an accelerator."""

    held_out: dict[str, Any] | None = None  # what the last evaluation measured
    interrupted = False
    _place: tuple[int, int] | None = None  # number of the epoch and steps done in it; None between epochs
    _saved = 0  # number of steps of the newest checkpoint
    _asked_to_stop = False
    _metrics: MetricsFile | None = None  # only in the first process

    def __init__(
        self,
        model: Any,
        config: TrainerConfig,
        train: DataLoader,
        held_out: DataLoader,
        others: Mapping[str, DataLoader],
    ) -> None:
        self.others = others  # measured beside the held-out documents
        self.also: dict[str, dict[str, Any]] = {}  # what the last evaluation measured of them
        self._call = config.val_call_kwargs or {}  # with which speculators calls the model in an evaluation
        super().__init__(model, config, train, held_out)

    def setup_trainer(self) -> None:
        if not torch.accelerator.is_available():
            self.local_rank = self.device_type = "cpu"
        # speculators would save bfloat16, and a resumed run would differ from the one that was stopped.
        self.checkpointer.save_checkpoint = partial(self.checkpointer.save_checkpoint, float_dtype=torch.float32)
        super().setup_trainer()
        self._saved = self.global_step

    def setup_optimizer(self) -> None:
        super().setup_optimizer()
        for optimizer in self.optimizers:
            if isinstance(optimizer, torch.optim.AdamW):
                for group in optimizer.param_groups:
                    group["betas"] = BETAS

    def run_training(self) -> None:
        steps = self.config.max_steps or self.config.num_epochs * len(self.train_loader)
        self._between = min(_STEPS_BETWEEN_CHECKPOINTS, steps // 10)
        reports = logging.getLogger(METRICS)
        if self.rank == 0:
            file = metrics_file(self.checkpointer.path)
            self._metrics = MetricsFile(file, self.global_step, self._call["ttt_step_loss_decay"])
            reports.addHandler(self._metrics)
        try:
            with progress("Training", steps, "step", done=self.global_step, silent=self.rank > 0) as shown:
                self.progress = shown
                with suppress(_AllSteps):
                    super().run_training()
                shown.stopped = self.interrupted
            if not self.interrupted and self.held_out is None:  # a kill came between the last step and its evaluation
                self.val_epoch(max(self.current_epoch - 1, 0))
        finally:
            if self._metrics:
                reports.removeHandler(self._metrics)
                self._metrics.close()
            for backend in reports.handlers:  # TensorBoard's backend otherwise flushes only every two minutes.
                backend.flush()

    def train_epoch(self, epoch: int) -> None:
        if self.config.max_steps is not None and self.global_step >= self.config.max_steps:
            raise _AllSteps  # speculators would take one more step in each epoch that is left.
        if not self.is_distributed:
            # speculators would stop inside a step, from where it cannot resume.
            for sign in (signal.SIGINT, signal.SIGTERM):
                signal.signal(sign, self._ask_to_stop)
        self._place = (epoch, self._resume_local_step if epoch == self.current_epoch else 0)
        try:
            super().train_epoch(epoch, step_callback=self._stepped)
        except RuntimeError as error:
            if "circuit breaker" not in str(error):
                raise
            self.maybe_save_checkpoint("interrupted")  # The error is raised between two steps.
            states: Any = self.train_loader.dataset  # The class is speculators'.
            raise ConnectionError(
                f"{states.vllm_endpoint}: no hidden states any more ({error}); start vLLM again and repeat the command "
                "to resume"
            ) from None
        self._place = None

    def val_epoch(self, epoch: int) -> dict[str, float] | None:
        with watched(self.model) as found:
            report = super().val_epoch(epoch)
        counts = gathered(found, self._call["ttt_steps"])
        if not report or not counts.any():
            logger.warning("epoch %d: no process had a held-out answer, so nothing was measured", epoch)
            return report
        self.held_out = measure_places(report, self._call["ttt_step_loss_decay"]) | measure_cycles(counts)
        self._report("held-out", epoch, self.held_out)
        for name, loader in self.others.items():
            self.also[name] = measure_cycles(self._walk_through(loader))
            self._report(name, epoch, self.also[name])
        return report

    @torch.no_grad()
    def _walk_through(self, loader: DataLoader) -> np.ndarray:
        """Count the cycles in all documents of a loader, int64 [documents, K + 1]."""
        with watched(self.model) as found, torch.autocast(self.device_type, dtype=self.config.hidden_states_dtype):
            for batch in loader:
                moved = {k: v.to(self.local_rank) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
                self.model(**moved, **self._call)
        return gathered(found, self._call["ttt_steps"])

    def _report(self, split: str, epoch: int, measured: Mapping[str, Any]) -> None:
        if self._metrics:
            self._metrics.write({"split": split, "step": self.global_step, "epoch": epoch, **measured})
            report = {split: {"acceptance_length": measured["length"]}}
            logging.getLogger(METRICS).info(report, extra={"step": self.global_step})
            loss = f"loss {measured['loss']:.3f}, " if "loss" in measured else ""
            logger.info("epoch %d, %s: %s%s", epoch, split, loss, describe(measured))

    def maybe_save_checkpoint(self, epoch: int | str, local_step: int = 0) -> None:
        last = epoch == self.config.num_epochs - 1 and not local_step
        last |= self.config.max_steps is not None and self.global_step >= self.config.max_steps
        if epoch == "interrupted":
            self.interrupted = True
            if self._place is None or self.is_distributed:  # The processes may be at different steps.
                return
            epoch, local_step = self._place
            # Any frequency below 1 saves a checkpoint now, whatever frequency the user has set.
            self.config: TrainerConfig = self.config._replace(checkpoint_freq=0.5, save_best=False)
        elif last:
            # The drafter is exported from the last checkpoint, which a frequency of several epochs might not save.
            self.config = self.config._replace(checkpoint_freq=0.5)
        elif self.config.checkpoint_freq < 1 and self.global_step - self._saved < self._between:
            return
        self._saved = self.global_step
        path = self.checkpointer.path
        self.checkpointer.path = path / _UNFINISHED
        try:
            super().maybe_save_checkpoint(epoch, local_step)
        except (OSError, RuntimeError, SafetensorError) as error:  # from pathlib, torch.save and safetensors
            raise OSError(
                f"{path}: a checkpoint was not written ({error}); the last one is whole, make room on the disk and "
                "repeat the command"
            ) from None
        finally:
            self.checkpointer.path = path
        if self.rank == 0:
            _publish(path, str(epoch))

    def maybe_update_best(self, epoch: int, val_metrics: dict[str, float] | None) -> None:
        if self.config.save_best or self._saved == self.global_step:  # else the end of this epoch has no checkpoint
            super().maybe_update_best(epoch, val_metrics)

    def _ask_to_stop(self, sign: int, frame: FrameType | None) -> None:
        if self._asked_to_stop:
            raise KeyboardInterrupt
        self._asked_to_stop = True

    def _stepped(self) -> None:
        self.progress.update()
        assert self._place is not None
        self._place = (self._place[0], self._place[1] + 1)
        if self.device_type == "cpu" and self.global_step % _STEPS_BETWEEN_CHECKPOINTS == 0:
            return_holes()
        if self._asked_to_stop:
            raise TrainingInterruptedError


def metrics_file(checkpoints: str | Path) -> Path:
    """Return the file with the metrics of the run whose checkpoints are in this folder."""
    return Path(checkpoints).parent / "metrics.jsonl"


def _publish(path: Path, name: str) -> None:
    """Move the unfinished checkpoint ``name``, if there is one, to its place, and remove older ones but the best."""
    unfinished = path / _UNFINISHED / name
    published = unfinished.exists()
    if published:
        if (path / name).exists():
            (path / name).rename(path / f"{name}{_REPLACED}")
        unfinished.rename(path / name)
    settle(path)
    best = (path / "checkpoint_best").resolve().name
    for old in path.iterdir() if published else ():
        if old.name.isdigit() and int(old.name) < int(name) and old.name != best:
            shutil.rmtree(old)


def settle(path: str | Path) -> None:
    """Clean up what a run has left in its folder if it was killed while it wrote a checkpoint."""
    path = Path(path)
    shutil.rmtree(path / _UNFINISHED, ignore_errors=True)
    for replaced in path.glob(f"*{_REPLACED}"):
        if replaced.with_suffix("").exists():
            shutil.rmtree(replaced)
        else:  # The kill came between the two renames.
            replaced.rename(replaced.with_suffix(""))
