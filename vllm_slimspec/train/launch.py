"""Train a drafter with speculators, from hidden states to a folder that vLLM serves.

speculators finds its EAGLE-3 defaults and its preprocessing (``shift_batch``) by the *name* "eagle3". Without that
preprocessing, tokens and states would be one place apart, and training would go on without an error. So the model of
this package is registered under that name during a run. Every part of speculators that is replaced is replaced in
:func:`slimspec_in_speculators`.
"""

import json
import logging
import os
import statistics
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from speculators import SpeculatorModel
from speculators.losses import eager as eager_losses
from speculators.losses import utils as speculators_losses
from speculators.train import checkpointer as speculators_checkpointer
from speculators.train import cli as speculators_cli
from speculators.train import distributed as topology
from speculators.train import trainer as speculators_trainer
from speculators.train.logger import setup_metric_logger
from transformers import AutoConfig

import vllm_slimspec
from vllm_slimspec.common.large_tensors import keep_freed_memory
from vllm_slimspec.common.output import beside, claim_folder, write_whole
from vllm_slimspec.common.progress import progress
from vllm_slimspec.common.work_dtype import work_dtype
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.errors import CheckpointError, OptionError
from vllm_slimspec.train import on_cpu
from vllm_slimspec.train.config import MIXED, resolve
from vllm_slimspec.train.export import check_servable, export
from vllm_slimspec.train.held_out import check_measurable, loader_like
from vllm_slimspec.train.metrics import METRICS, plot_metrics, read_metrics
from vllm_slimspec.train.model import SlimSpecEagle3Model
from vllm_slimspec.train.plan import drafter_operations
from vllm_slimspec.train.quiet import quiet
from vllm_slimspec.train.store import check_states, read_identity
from vllm_slimspec.train.trainer import SlimSpecTrainer, metrics_file, settle

logger = logging.getLogger(__name__)

# The settings that identify a run. A checkpoint is only resumed by a run with the same ones.
_IDENTITY = (
    *("verifier_name_or_path", "data_path", "from_pretrained"),
    *("lm_head_rank", "head_is_targets", "head_init", "draft_vocab_size", "draft_arch", "num_layers"),
    *("total_seq_len", "seed", "optimizer", "lr", "loss_fn", "epochs", "max_steps", "train_data_ratio"),
)


@contextmanager
def slimspec_in_speculators(others: Mapping[str, Path] | None = None) -> Iterator[list[SlimSpecTrainer]]:
    """Make ``speculators train --speculator-type eagle3`` use the model and the trainer of this package.

    ``others`` are folders of further hidden states to measure on, by name. The context yields a list of the trainers
    that are made in it, because speculators does not return them.
    """
    trainers: list[SlimSpecTrainer] = []

    def make_trainer(model: Any, config: Any, train: Any, held_out: Any) -> SlimSpecTrainer:
        check_servable(model)
        if not dist.is_initialized() or dist.get_rank() == 0:
            settle(config.save_path)
        if dist.is_initialized():
            dist.barrier()
        also = {name: loader_like(held_out, folder) for name, folder in (others or {}).items()}
        trainers.append(SlimSpecTrainer(model, config, train, held_out, also))
        return trainers[-1]

    with ExitStack() as stack:

        def replace(place: Any, **values: Any) -> None:
            stack.enter_context(patch.multiple(place, **values))

        replace(SpeculatorModel, registry={**(SpeculatorModel.registry or {}), "eagle3": SlimSpecEagle3Model})
        replace(speculators_cli, Trainer=make_trainer, setup_metric_logger=_setup_metrics)
        replace(speculators_cli, setup_root_logger=lambda: None)  # the caller decides how to log
        replace(speculators_trainer, tqdm=lambda loader, **_: loader)  # the run has one bar of its own
        if not torch.accelerator.is_available():
            # speculators synchronizes with a GPU and loads checkpoints to it without asking whether there is one.
            replace(torch.accelerator, synchronize=lambda: None)
            replace(speculators_checkpointer, get_current_device=lambda: "cpu")
            replace(speculators_cli, maybe_setup_distributed=_setup_gloo)
            losses = speculators_losses._LOSS_FN_MAPS
            replace(
                speculators_losses, _LOSS_FN_MAPS=losses | {"eager": losses["eager"] | {"kl_div": on_cpu.kl_div_loss}}
            )
            replace(eager_losses, kl_div_loss=on_cpu.kl_div_loss)  # for losses that contain it
            replace(torch, argmax=on_cpu.argmax)
        yield trainers


@quiet()
def fit(
    target: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    also_evaluate: Mapping[str, Path] | None = None,
    **flags: Any,
) -> DraftCheckpoint | None:
    """Train a SlimSpec drafter for ``target``, write it to ``output`` and return it.

    Args:
        target: Hugging Face folder or id.
        data: folder of hidden states, written by :mod:`vllm_slimspec.train.states` or by speculators.
        output: folder of the drafter, which must be missing or empty. Everything else goes to ``<output>.run``:
            metrics.jsonl, training.png, and the checkpoints from which a stopped or killed run resumes.
        also_evaluate: further folders like ``data``, by name, on which the acceptance length is measured after
            each epoch.
        flags: ``head``, ``rank``, ``head_init`` and flags of speculators, see :func:`resolve`.

    Returns:
        The drafter; None in every process of torchrun but the first.

    Raises:
        OptionError: a value is not allowed.
        CheckpointError: the data cannot be used, or ``<output>.run`` holds another run.
        OutputError: the output exists, cannot be written, or is being written by another process.
        OSError: the disk is full, or the vLLM server of ``on_missing="generate"`` is gone. Checkpoints are kept.
        KeyboardInterrupt: the run was interrupted; its checkpoint is kept.
    """
    config = resolve(target, data, output, **flags)
    run, data, output, others = config.flatten(), Path(data), Path(output), also_evaluate or {}
    if not (data / "dataset_info.json").exists():
        raise CheckpointError(f"{data}: holds no training data; make it with `slimspec train states` first")
    if run["draft_vocab_size"] and not (data / "token_freq.pt").exists():
        raise CheckpointError(
            f"{data}: holds no token_freq.pt, by which --draft-vocab-size chooses tokens; write the states again"
        )
    known = read_identity(data)
    sizes = {name: run[name] for name in ("total_seq_len", "ttt_steps")}
    check_measurable(data, train_data_ratio=run["train_data_ratio"], **sizes)
    for name, folder in others.items():
        if not (folder / "dataset_info.json").exists() or read_identity(folder)["layer_ids"] != known["layer_ids"]:
            raise OptionError(
                f"--also-evaluate {name}={folder}: holds no states of the same layers as {data}; write them with "
                "`slimspec train states`"
            )
        check_measurable(folder, train_data_ratio=0, **sizes)
    # Of torchrun's processes, the first one writes the output.
    process, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    with (
        claim_folder(output, run=beside(output, ".run")) if process == 0 else nullcontext(),
        progress("train fit", ends=False, silent=process > 0),
    ):
        if process == 0:
            work_dtype(flags.get("hidden_states_dtype", "auto"), MIXED).log("training")
        if not torch.accelerator.is_available():
            keep_freed_memory()
        check_states(data, missing_is_wrong=run["on_missing"] == "raise", part=process, parts=processes)
        for folder in others.values():
            check_states(folder, part=process, parts=processes)
        if process == 0:
            _claim(output, run)
            if not known["prompts"]:
                logger.warning(
                    "%s: the data do not say which tokens are prompts, so every token is trained on and measured", data
                )
        with slimspec_in_speculators(others) as trainers:
            speculators_cli.main(config)
        (trainer,) = trainers
        if trainer.interrupted:
            raise KeyboardInterrupt(f"stopped; the checkpoint is in {run['save_path']}")
        return _export(trainer, run, output) if process == 0 else None


def _export(trainer: SlimSpecTrainer, run: Mapping[str, Any], output: Path) -> DraftCheckpoint:
    # The trainer's own model may be wrapped or sharded by torchrun, so the last checkpoint is read.
    checkpoints = Path(run["save_path"])
    last = max((path for path in checkpoints.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    model = SlimSpecEagle3Model.from_pretrained(str(last))
    metrics = metrics_file(checkpoints)
    # The median step of each device. The number of operations is what a plan takes as --tflops.
    steps = [line["tokens_per_s"] for line in read_metrics(metrics) if line["split"] == "train"]
    tokens = statistics.median(steps) if steps else 0.0
    tflops = tokens * drafter_operations(model, run["ttt_steps"], run["total_seq_len"]) / 1e12
    logger.info("%d steps, %.0f tokens and %.3g TFLOP a second on each device", trainer.global_step, tokens, tflops)
    target = run["verifier_name_or_path"]
    provenance = {
        "command": sys.argv,
        "versions": {
            "vllm-slimspec": vllm_slimspec.__version__,
            **{name: version(name) for name in ("speculators", "torch", "transformers")},
        },
        "target": target,
        "flags": {key: run[key] for key in sorted(run) if run[key] is not None},
        "steps": trainer.global_step,
        "held_out": trainer.held_out,
        **({"also_evaluated": trainer.also} if trainer.others else {}),
        "tokens_per_s": tokens,
        "tflops": tflops,
    }
    dtype = AutoConfig.from_pretrained(target, trust_remote_code=False).get_text_config().dtype or torch.bfloat16
    checkpoint = export(model, output, dtype=dtype, provenance=provenance)
    plot_metrics(metrics, metrics.with_name("training.png"))
    return checkpoint


def _claim(output: Path, run: Mapping[str, Any]) -> None:
    """Write the identity of this run to ``<output>.run``, or refuse a folder that holds another run."""
    folder = beside(output, ".run")
    mine = {key: run[key] for key in _IDENTITY}
    file = folder / "run.json"
    theirs = json.loads(file.read_text()) if file.exists() else mine
    differing = [f"{key}={theirs.get(key)!r} there, {mine[key]!r} now" for key in mine if theirs.get(key) != mine[key]]
    if differing:
        raise CheckpointError(
            f"{folder}: holds another run ({', '.join(differing)}); remove it or choose another output"
        )
    if not file.exists():
        write_whole(file, lambda part: part.write_text(json.dumps(mine, indent=2) + "\n"))


def _setup_gloo() -> None:
    """Stand in for speculators' ``maybe_setup_distributed``, which asks for an accelerator, for torchrun on CPUs."""
    if "LOCAL_RANK" not in os.environ:
        return
    dist.init_process_group("gloo")
    topology._rank, topology._world_size, topology._is_distributed = dist.get_rank(), dist.get_world_size(), True
    topology._init_sp_process_groups(topology._rank, topology._world_size, 1)


def _setup_metrics(**options: Any) -> None:
    """Set up speculators' metrics for its backends (``--logger tensorboard``), without a log line for every step."""
    # A caller who wants those lines sets a level on speculators' logger first.
    level = logging.getLogger("speculators").level or logging.WARNING
    setup_metric_logger(**options)
    logging.getLogger("speculators").setLevel(level)
    logging.getLogger(METRICS).propagate = level <= logging.INFO
