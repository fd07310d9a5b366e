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
from vllm_slimspec.train.documents import number_to_train_on
from vllm_slimspec.train.model import SlimSpecEagle3Model
from vllm_slimspec.train.quiet import quiet

_AT_ONCE = 256  # requests that vLLM answers together; one read of the target's weights serves all of them
_ADAM = 8  # bytes of both moments of a parameter
_FLOAT = 4  # bytes of a number in float32


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

    steps: int
    trained: int  # number of parameters
    frozen: int  # number of parameters
    checkpoint_bytes: int
    stages: list[Stage]
    rows: dict[str, str]  # what the first table says

    def tables(self, tflops: float | None = None, terabytes: float | None = None) -> list[Table]:
        """Return the plan as tables for a terminal, with device hours if both throughputs are given."""
        run = Table(show_header=False, box=None)
        for name, value in self.rows.items():
            run.add_row(name, value)
        stages = Table("stage", "operations", "bytes read", "left on disk", box=None)
        if tflops and terabytes:
            stages.add_column(f"device hours at {tflops:g} TFLOP/s, {terabytes:g} TB/s")
        for stage in self.stages:
            cells = [stage.name, f"{stage.operations:.2e}", _gb(stage.bytes_read), _gb(stage.disk)]
            if tflops and terabytes:
                seconds = max(stage.operations / tflops, stage.bytes_read / terabytes) / 1e12  # the slower of the two
                cells.append(f"{seconds / 3600:,.1f}")
            stages.add_row(*cells)
        return [run, stages]


@quiet()
def make_plan(
    config: SlimSpecTrainConfig, lengths: list[int], output: str | Path, *, answered: int = 0, ranks: int = 1
) -> Plan:
    """Return the plan of a run. Only config.json of the target is read.

    Args:
        config: configuration of the run, from :func:`vllm_slimspec.train.config.resolve`.
        lengths: number of tokens of each document, held-out ones included.
        output: folder of the drafter.
        answered: number of all tokens that the target has still to write.
        ranks: number of devices that train.
    """
    run = config.flatten()
    name, length, ratio = run["verifier_name_or_path"], run["total_seq_len"], run["train_data_ratio"]
    target_config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    with torch.device("meta"):
        target = AutoModelForCausalLM.from_config(target_config, trust_remote_code=False)
    drafter = build_empty(config)
    itemsize = (target_config.get_text_config().dtype or torch.bfloat16).itemsize
    tokens = sum(lengths)
    states = tokens * ((len(drafter.target_layer_ids) + 1) * drafter.hidden_size * itemsize + 8)
    trained, frozen = (sum(p.numel() for p in drafter.parameters() if p.requires_grad is r) for r in (True, False))
    kept = trained + drafter.embed_tokens.weight.numel()
    in_training = lengths[: number_to_train_on(len(lengths), ratio)]
    per_epoch = len(MultipackDistributedBatchSamplerV2(length, in_training, ranks, 0, seed=run["seed"]))
    steps = run["max_steps"] or run["epochs"] * per_epoch
    weights = itemsize * sum(p.numel() for p in target.parameters())
    checkpoint = kept * _FLOAT + trained * _ADAM
    stages = [
        Stage("states", target_operations(target, lengths, head=False), 8 * tokens + weights, states),
        Stage(
            "fit",
            steps * length * ranks * drafter_operations(drafter, run["ttt_steps"], length),
            states * ratio * (steps / per_epoch),
            checkpoint * min(math.ceil(steps / per_epoch), 2),
        ),
    ]
    if answered:
        # Every token passes through the target once, because prompts are read by the same engine that answers them.
        read = math.ceil(answered / _AT_ONCE) * weights
        stages.insert(0, Stage("answers", target_operations(target, lengths), read, 8 * tokens))
    mean = tokens / len(lengths)
    per_device = (trained * (2 * _FLOAT + _ADAM) + frozen * _FLOAT) // (ranks if run["fsdp_shard"] else 1)
    # A draft step keeps its logits in bfloat16 and their softmax in float32. The target's logits are kept once.
    logits = (run["ttt_steps"] + 1) * length * drafter.draft_vocab_size * (2 + _FLOAT)
    files = f"{'answers.jsonl, states, ' if answered else ''}checkpoints, metrics.jsonl, training.png"
    rows = {
        "data": f"{len(lengths):,} documents, {tokens:,} tokens",
        "steps": f"{steps:,} in {run['epochs']} epochs on {ranks} device(s)",
        "tokens per step": f"{length * ranks:,}, or {length * ranks / mean:.0f} documents",
        "for a batch of 64 documents": f"--total-seq-len {math.ceil(64 * mean / ranks):,}",
        "trained parameters": f"{trained:,}, besides {frozen:,} frozen ones",
        "memory per device": f"{_gb(per_device)} weights, {_gb(logits)} logits (estimate)",
        "checkpoint": f"{_gb(checkpoint)} each; the newest and the best are kept",
        "output": f"{output}; {output}.run with {files}",
    }
    return Plan(steps, trained, frozen, checkpoint, stages, rows)


def build_empty(config: SlimSpecTrainConfig) -> SlimSpecEagle3Model:
    """Return the drafter of a run with tensors that take no memory (torch's meta device)."""
    run = config.flatten()
    target = AutoConfig.from_pretrained(run["verifier_name_or_path"], trust_remote_code=False).get_text_config()
    vocab = run["draft_vocab_size"] or target.vocab_size
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
    """Return the operations of one forward pass of a dense causal language model over documents of so many tokens.

    The pass computes logits only if ``head``.
    """
    config = target.config.get_text_config()
    looked_up, output = target.get_input_embeddings().weight, target.get_output_embeddings().weight
    # A lookup of embeddings multiplies nothing.
    matrices = sum(p.numel() for p in target.parameters()) - looked_up.numel()
    matrices += output.numel() * (int(head) - int(output is not looked_up))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_dim
    attention = 4.0 * config.num_hidden_layers * width * sum(n * n for n in lengths)
    return 2.0 * matrices * sum(lengths) + attention


def drafter_operations(drafter: SlimSpecEagle3Model, ttt_steps: int, length: int) -> float:
    """Return the operations of one token in training: forward pass of all draft steps, teacher, and backward pass.

    A training step has ``length`` tokens. Attention is computed over all of them and then masked.
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


def read_lengths(folder: Path) -> list[int]:
    """Return the number of tokens of each document in a folder of hidden states."""
    return list(load_from_disk(folder).with_format(None)["seq_len"])


def _gb(count: float) -> str:
    unit, name = (1e12, "TB") if count >= 1e12 else (1e9, "GB") if count >= 1e8 else (1e6, "MB")
    return f"{count / unit:,.{1 if count >= unit else 2}f} {name}"
