"""Estimate the steps, memory, disk space and operations of a training run before it is started.

Parameters are counted on the models themselves, which are built without memory (torch's meta device). Operations are
those of matrix products and of attention. A multiplication and an addition count as 2, and what a mask hides is counted
as well, as torch does. Norms, softmaxes, the optimizer and the time that a device waits are left out. The hours are for
the throughput that the user gives.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from datasets import load_from_disk
from rich.table import Table
from speculators.train import cli as speculators_cli
from speculators.train.distributed_batch_sampler import MultipackDistributedBatchSamplerV2
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from vllm_slimspec.train.config import SlimSpecTrainConfig
from vllm_slimspec.train.model import SlimSpecEagle3Model
from vllm_slimspec.train.quiet import quiet

AT_ONCE = 256  # requests that vLLM answers together; one read of the target's weights serves all of them
_ADAM = 8  # bytes of both moments of a parameter
_FLOAT = 4  # bytes of a number in float32


@dataclass(frozen=True)
class Data:
    """The size of the documents that are trained on."""

    lengths: list[int]  # tokens of each document
    answered: int = 0  # number of all tokens that the target has still to write

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class Stage:
    """What one stage costs on all of the data."""

    name: str
    operations: float
    bytes_read: float  # of weights and states
    disk: float  # bytes that it leaves on the disk


@dataclass(frozen=True)
class Plan:
    """What a run that is not started yet will cost."""

    documents: int
    tokens: int
    ranks: int
    tokens_per_step: int
    mean_length: float
    steps: int
    epochs: int
    trained: int  # number of parameters
    frozen: int  # number of parameters
    weights_bytes: int  # on each device: weights, gradients and moments of the optimizer
    logits_bytes: int  # on each device: logits of all draft steps, which the backward pass needs
    checkpoint_bytes: int
    stages: list[Stage]
    output: str
    beside: list[str]  # files in <output>.run

    def hours(self, stage: Stage, tflops: float, terabytes: float) -> float:
        """Return the device hours of a stage at a throughput in TFLOP/s and TB/s, whichever of the two limits it."""
        return max(stage.operations / tflops, stage.bytes_read / terabytes) / 1e12 / 3600

    def tables(self, tflops: float | None = None, terabytes: float | None = None) -> list[Table]:
        """Return the plan as tables for a terminal, with hours if both throughputs are given."""
        run = Table(show_header=False, box=None)
        for name, value in (
            ("data", f"{self.documents:,} documents, {self.tokens:,} tokens"),
            ("steps", f"{self.steps:,} in {self.epochs} epochs on {self.ranks} device(s)"),
            (
                "tokens per step",
                f"{self.tokens_per_step:,}, or {self.tokens_per_step / self.mean_length:.0f} documents",
            ),
            ("for a batch of 64 documents", f"--total-seq-len {math.ceil(64 * self.mean_length / self.ranks):,}"),
            ("trained parameters", f"{self.trained:,}, besides {self.frozen:,} frozen ones"),
            ("memory per device", f"{_gb(self.weights_bytes)} weights, {_gb(self.logits_bytes)} logits (estimate)"),
            ("checkpoint", f"{_gb(self.checkpoint_bytes)} each; the newest and the best are kept"),
            ("output", f"{self.output}; {self.output}.run with {', '.join(self.beside)}"),
        ):
            run.add_row(name, value)
        stages = Table("stage", "operations", "bytes read", "left on disk", box=None)
        if tflops and terabytes:
            stages.add_column(f"device hours at {tflops:g} TFLOP/s, {terabytes:g} TB/s")
        for stage in self.stages:
            cells = [stage.name, f"{stage.operations:.2e}", _gb(stage.bytes_read), _gb(stage.disk)]
            if tflops and terabytes:
                cells.append(f"{self.hours(stage, tflops, terabytes):,.1f}")
            stages.add_row(*cells)
        return [run, stages]


@quiet()
def make_plan(config: SlimSpecTrainConfig, data: Data, output: str | Path, *, ranks: int = 1) -> Plan:
    """Return the plan of a run. Only config.json of the target is read.

    Args:
        config: configuration of the run, from :func:`vllm_slimspec.train.config.resolve`.
        data: sizes of all documents, held-out ones included.
        output: folder of the drafter.
        ranks: number of devices that train.
    """
    run = config.flatten()
    name = run["verifier_name_or_path"]
    target_config = AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        target = AutoModelForCausalLM.from_config(target_config)
    drafter = build_empty(config)
    itemsize = (target_config.get_text_config().dtype or torch.bfloat16).itemsize
    states = _bytes_of_states(drafter, data, itemsize)
    trained, frozen = (sum(p.numel() for p in drafter.parameters() if p.requires_grad is r) for r in (True, False))
    kept = trained + (drafter.embed_tokens.weight.numel())
    ratio = run["train_data_ratio"]
    in_training = data.lengths[: int(len(data.lengths) * ratio)]
    per_epoch = len(MultipackDistributedBatchSamplerV2(run["total_seq_len"], in_training, ranks, 0, seed=run["seed"]))
    steps = run["max_steps"] or run["epochs"] * per_epoch
    logits = run["total_seq_len"] * drafter.draft_vocab_size
    weights = itemsize * sum(p.numel() for p in target.parameters())
    passes = math.ceil(data.answered / AT_ONCE)
    stages = [
        Stage("states", target_operations(target, data.lengths, head=False), states["read"] + weights, states["disk"]),
        Stage(
            "fit",
            steps * run["total_seq_len"] * ranks * drafter_operations(drafter, run["ttt_steps"], run["total_seq_len"]),
            states["disk"] * ratio * (steps / per_epoch),
            (kept * _FLOAT + trained * _ADAM) * min(math.ceil(steps / per_epoch), 2),
        ),
    ]
    if data.answered:
        # Every token passes through the target once, because prompts are read by the same engine that answers them.
        stages.insert(0, Stage("answers", target_operations(target, data.lengths), passes * weights, 8.0 * data.tokens))
    shards = ranks if run["fsdp_shard"] else 1
    return Plan(
        documents=len(data.lengths),
        tokens=data.tokens,
        ranks=ranks,
        tokens_per_step=run["total_seq_len"] * ranks,
        mean_length=data.tokens / len(data.lengths),
        steps=steps,
        epochs=run["epochs"],
        trained=trained,
        frozen=frozen,
        weights_bytes=(trained * (2 * _FLOAT + _ADAM) + frozen * _FLOAT) // shards,
        # A draft step keeps its logits in bfloat16 and their softmax in float32. The target's logits are kept once.
        logits_bytes=(run["ttt_steps"] + 1) * logits * (2 + _FLOAT),
        checkpoint_bytes=kept * _FLOAT + trained * _ADAM,
        stages=stages,
        output=str(output),
        beside=[
            *(["answers.jsonl", "states"] if data.answered else []),
            "checkpoints",
            "metrics.jsonl",
            "training.png",
        ],
    )


def build_empty(config: SlimSpecTrainConfig) -> SlimSpecEagle3Model:
    """Return the drafter of a run with tensors that take no memory (torch's meta device)."""
    run = config.flatten()
    vocab = (
        run["draft_vocab_size"] or AutoConfig.from_pretrained(run["verifier_name_or_path"]).get_text_config().vocab_size
    )
    with (
        torch.device("meta"),
        patch.multiple(
            SlimSpecEagle3Model,
            load_verifier_weights=lambda self: None,
            load_vocab_mappings=lambda self, *_: None,
            init_head=lambda self, *_: None,
        ),
    ):
        return speculators_cli.build_draft_model(argparse.Namespace(**run), SlimSpecEagle3Model, None, None, vocab)


def target_operations(target: PreTrainedModel, lengths: list[int], *, head: bool = True) -> float:
    """Return the operations of one forward pass of a dense causal language model over documents.

    Args:
        target: the model.
        lengths: tokens of each document.
        head: whether the pass computes logits.
    """
    config = target.config.get_text_config()
    looked_up, output = target.get_input_embeddings().weight, target.get_output_embeddings().weight
    matrices = (
        sum(p.numel() for p in target.parameters()) - looked_up.numel()
    )  # A lookup of embeddings multiplies nothing.
    matrices += output.numel() * (int(head) - int(output is not looked_up))
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    attention = 4.0 * config.num_hidden_layers * width * sum(n * n for n in lengths)
    return 2.0 * matrices * sum(lengths) + attention


def drafter_operations(drafter: SlimSpecEagle3Model, ttt_steps: int, length: int) -> float:
    """Return the operations of one token in training: forward pass of all draft steps, teacher, and backward pass.

    Args:
        drafter: the drafter that is trained.
        ttt_steps: number of draft steps.
        length: tokens of a training step. Attention is computed over all of them and then masked.
    """
    once = drafter.fc.weight.numel()
    every = sum(p.numel() for p in [*drafter.layers.parameters(), *drafter.lm_head.parameters()] if p.ndim == 2)
    teacher = drafter.verifier_lm_head.weight.numel()
    layer = drafter.config.transformer_layer_config
    width = layer.num_attention_heads * (layer.head_dim or layer.hidden_size // layer.num_attention_heads)
    keys = sum(length * (step + 1) for step in range(ttt_steps))  # Each step also sees the keys of the earlier ones.
    attention = 4.0 * layer.num_hidden_layers * width * keys
    # The backward pass needs two products for each one of the forward pass.
    return 2.0 * (3 * once + 3 * ttt_steps * every + teacher) + 3 * attention


def data_of(folder: Path) -> Data:
    """Return the sizes of the documents in a folder of hidden states."""
    return Data(list(load_from_disk(folder).with_format(None)["seq_len"]))


def _bytes_of_states(drafter: SlimSpecEagle3Model, data: Data, itemsize: int) -> dict[str, float]:
    slots = len(drafter.target_layer_ids) + 1
    return {"disk": float(data.tokens * (slots * drafter.hidden_size * itemsize + 8)), "read": 8.0 * data.tokens}


def _gb(count: float) -> str:
    unit = 1e12 if count >= 1e12 else 1e9 if count >= 1e8 else 1e6
    return f"{count / unit:,.{1 if count >= unit else 2}f} {({1e12: 'TB', 1e9: 'GB', 1e6: 'MB'})[unit]}"
