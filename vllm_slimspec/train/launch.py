"""One training run, on the real trainer of speculators, from hidden states to a drafter that vLLM serves.

speculators finds its preprocessing (``shift_batch``, without which tokens and states are one place apart and training
runs on happily) and its EAGLE-3 defaults by the *name* "eagle3". So the run keeps that name, and for its length our
model stands under it. Everything that is replaced in speculators is replaced in :func:`slimspec_in_speculators`.
"""

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from pydantic import Field, ValidationError
from speculators import SpeculatorModel
from speculators.train import checkpointer as speculators_checkpointer
from speculators.train import cli as speculators_cli
from speculators.train import trainer as speculators_trainer
from speculators.train.config import TrainConfig
from speculators.train.logger import setup_metric_logger
from speculators.train.trainer import Trainer
from tqdm import tqdm
from transformers import AutoConfig

import vllm_slimspec
from vllm_slimspec.checkpoint import DraftCheckpoint
from vllm_slimspec.train.export import export
from vllm_slimspec.train.model import HeadInit, SlimSpecEagle3Model
from vllm_slimspec.train.quiet import quiet
from vllm_slimspec.train.store import check_states, read_layer_ids

logger = logging.getLogger(__name__)

BETAS = (0.9, 0.95)

# The paper's, in speculators' names. Its batch of 64 sequences is expressed as tokens in a step: total_seq_len x ranks.
RECIPE: Mapping[str, Any] = {
    "epochs": 10,
    "optimizer": "adamw",
    "lr": 4e-4,
    "weight_decay": 0.0,
    "scheduler_type": "cosine",
    "scheduler_warmup_steps": 100,
    "loss_fn": "kl_div",
}
# The shape of a fresh drafter, where no --draft-config or --from-pretrained gives one. Without it, the layer silently
# becomes a sliding window of 2048.
_SHAPE: Mapping[str, Any] = {"full_attention_indices": [0]}
# speculators has no switch for a machine without an accelerator.
_CPU_RECIPE: Mapping[str, Any] = {"draft_attn_impl": "sdpa", "loss_implementation": "eager", "num_workers": 0}


class SlimSpecTrainConfig(TrainConfig):
    """speculators' configuration and ours, which travel to the model together."""

    lm_head_rank: int = Field(default=1, ge=0)
    head_init: HeadInit = "weighted-svd"

    def flatten(self) -> dict[str, Any]:
        return {**super().flatten(), "lm_head_rank": self.lm_head_rank, "head_init": self.head_init}


class SlimSpecTrainer(Trainer):
    """speculators' trainer with the paper's betas and lossless checkpoints, on a machine without an accelerator too."""

    held_out: dict[str, float] | None = None  # the last validation
    interrupted = False

    def setup_trainer(self) -> None:
        if not torch.accelerator.is_available():
            self.local_rank = self.device_type = "cpu"
        # bf16 otherwise: a resumed run would not be the run that was stopped.
        self.checkpointer.save_checkpoint = partial(self.checkpointer.save_checkpoint, float_dtype=torch.float32)
        super().setup_trainer()

    def setup_optimizer(self) -> None:
        super().setup_optimizer()
        for optimizer in self.optimizers:
            if isinstance(optimizer, torch.optim.AdamW):
                for group in optimizer.param_groups:
                    group["betas"] = BETAS

    def run_training(self) -> None:
        steps = self.config.max_steps or self.config.num_epochs * len(self.train_loader)
        silent = None if self.rank == 0 else True  # None: where stderr is no terminal
        with tqdm(total=steps, initial=self.global_step, desc="Training", unit="step", disable=silent) as self.progress:
            super().run_training()

    def train_epoch(self, epoch: int) -> None:
        super().train_epoch(epoch, step_callback=self.progress.update)

    def val_epoch(self, epoch: int) -> dict[str, float] | None:
        self.held_out = super().val_epoch(epoch)
        if self.held_out:
            rates = [f"{rate:.3f}" for key, rate in self.held_out.items() if key.startswith("full_acc_")]
            logger.info("epoch %d: held-out loss %.3f, accepted by place %s", epoch, self.held_out["loss_epoch"], rates)
        return self.held_out

    def maybe_save_checkpoint(self, epoch: int | str, local_step: int = 0) -> None:
        self.interrupted = epoch == "interrupted"
        super().maybe_save_checkpoint(epoch, local_step)


@contextmanager
def slimspec_in_speculators() -> Iterator[list[SlimSpecTrainer]]:
    """Inside, ``speculators train --speculator-type eagle3`` trains our model with our trainer.

    Yields:
        The trainers made inside: speculators keeps them to itself, and with them the trained models.
    """
    trainers: list[SlimSpecTrainer] = []

    def make_trainer(*args: Any) -> SlimSpecTrainer:
        trainers.append(SlimSpecTrainer(*args))
        return trainers[-1]

    with (
        patch.dict(SpeculatorModel.registry, eagle3=SlimSpecEagle3Model),
        patch.object(speculators_cli, "Trainer", make_trainer),
        patch.object(speculators_trainer, "tqdm", lambda loader, **_: loader),  # one bar for the run, not one an epoch
        patch.object(speculators_cli, "setup_root_logger", lambda: None),  # how to log is the caller's
        patch.object(speculators_cli, "setup_metric_logger", _setup_metrics),
        nullcontext() if torch.accelerator.is_available() else _no_accelerator(),
    ):
        yield trainers


@quiet()
def fit(
    target: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    head: Literal["low-rank", "dense"] = "low-rank",
    rank: int | None = None,
    head_init: HeadInit = "weighted-svd",
    **flags: Any,
) -> DraftCheckpoint:
    """Train a SlimSpec drafter for ``target`` and write it to ``output``.

    Args:
        target: Hugging Face folder or id.
        data: a folder of hidden states, see :mod:`vllm_slimspec.train.states`.
        output: the drafter; must not exist, or be empty. Checkpoints of the run go to ``<output>.run`` and are resumed
            from there.
        head: ``dense`` for a drafter to compare with: the ordinary head, trained like the factors and served by vLLM.
        rank: R of a low-rank head; default D // 8.
        head_init: how the factors start, see :meth:`SlimSpecEagle3Model.init_head`.
        flags: any flag of ``speculators train``, with underscores; they win over :data:`RECIPE`.

    Raises:
        ValueError: a value is not allowed, or the output is taken.
        KeyboardInterrupt: the run was interrupted; its checkpoint is kept.
    """
    _require_speculators()
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: exists and is not an empty folder; remove it or choose another output")
    if not (Path(data) / "dataset_info.json").exists():
        raise ValueError(f"{data}: holds no training data; make it with `slimspec train states` first")
    if flags.get("draft_vocab_size") and not (Path(data) / "token_freq.pt").exists():
        raise ValueError(f"{data}: no token_freq.pt to choose a vocabulary by; write the states again")
    layer_ids = read_layer_ids(Path(data))
    if layer_ids and flags.get("target_layer_ids", layer_ids) != layer_ids:
        raise ValueError(f"{data}: holds the states of layers {layer_ids}; leave target_layer_ids out or write others")
    target_config = AutoConfig.from_pretrained(str(target)).get_text_config()
    hidden = target_config.hidden_size
    rank = hidden // 8 if rank is None else rank
    if not 1 <= rank <= hidden:
        raise ValueError(f"rank={rank} does not fit hidden_size={hidden} of {target}; choose 1 to {hidden}")

    run = {
        **RECIPE,
        **({} if flags.keys() & {"draft_config", "from_pretrained"} else _SHAPE),
        **({} if torch.accelerator.is_available() else _CPU_RECIPE),
        "mask_token_id": 0,  # EAGLE-3 never masks; unset, speculators looks for a tokenizer to choose one
        "on_missing": "raise",
        "log_dir": f"{output}.run/logs",
        "target_layer_ids": layer_ids,
        **flags,
        "verifier_name_or_path": str(target),
        "data_path": str(data),
        "save_path": f"{output}.run",
        "lm_head_rank": rank if head == "low-rank" else 0,
        "head_init": head_init,
    }
    unknown = run.keys() - SlimSpecTrainConfig().flatten().keys()
    if unknown:
        raise ValueError(f"unknown flags {sorted(unknown)}; `speculators train --help` lists them")
    try:
        config = SlimSpecTrainConfig.from_sources(cli=run, argv=sys.argv)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{first['loc'][-1]}={first['input']!r}: {first['msg']}") from None
    if os.environ.get("RANK", "0") == "0":  # of torchrun: one process is enough
        check_states(Path(data), missing_is_wrong=run["on_missing"] == "raise")
    with slimspec_in_speculators() as trainers:
        speculators_cli.main(config)
    (trainer,) = trainers
    if trainer.interrupted:
        raise KeyboardInterrupt(f"stopped; the checkpoint is in {output}.run")
    return export(
        trainer.model,
        output,
        dtype=target_config.dtype or torch.bfloat16,
        provenance={
            "command": sys.argv,
            "versions": {
                "vllm-slimspec": vllm_slimspec.__version__,
                **{name: version(name) for name in ("speculators", "torch", "transformers")},
            },
            "target": str(target),
            "flags": run,
            "steps": trainer.global_step,
            "held_out": trainer.held_out,
        },
    )


def _setup_metrics(**options: Any) -> None:
    """speculators' metrics for its own backends (``--logger tensorboard``), not a line a step for everybody's logs."""
    # A caller who wants speculators' own lines sets a level on its logger first.
    level = logging.getLogger("speculators").level or logging.WARNING
    setup_metric_logger(**options)
    logging.getLogger("speculators").setLevel(level)
    logging.getLogger("speculators.metrics").propagate = level <= logging.INFO


@contextmanager
def _no_accelerator() -> Iterator[None]:
    """speculators waits for, and loads checkpoints to, a GPU without asking whether there is one."""
    with (
        patch.object(torch.accelerator, "synchronize", lambda: None),
        patch.object(speculators_checkpointer, "get_current_device", lambda: "cpu"),
    ):
        yield


def _require_speculators() -> None:
    found = version("speculators")
    if not found.startswith("0.9."):
        raise ValueError(f"speculators {found} is not supported, 0.9.* is; pip install 'vllm-slimspec[train]'")
