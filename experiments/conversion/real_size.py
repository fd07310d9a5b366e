"""Measure the time and the peak memory of a conversion at the sizes of Llama-3.1-8B, with synthetic weights.

    python experiments/conversion/real_size.py build/real-size --json docs/results/convert-8b.json

Writes a drafter (D=4096, V=128256, bfloat16) and 100,000 head states of random numbers, 2.6 GB in all, converts them at
rank 512 and prints the minutes and gigabytes of the whole command, measuring included. The quality of the result means
nothing here, because random heads are not nearly of low rank.

Expected output: a few minutes, and less than 12 GiB at most.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel
from safetensors.torch import save_file

from vllm_slimspec.commands.options import claim_results
from vllm_slimspec.common.console import one_line_errors
from vllm_slimspec.common.device import device_name
from vllm_slimspec.common.progress import steps
from vllm_slimspec.engine.head_states import Rows, StatesWriter
from vllm_slimspec.measure.results import Results, provenance

D, V, R, FF, HEADS, KV_HEADS = 4096, 128_256, 512, 14_336, 32, 8
STATES, DOCUMENTS, K = 100_000, 400, 5
CONFIG = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_size": D,
    "intermediate_size": FF,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": 128,
    "vocab_size": V,
    "draft_vocab_size": V,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}


class Row(BaseModel):
    """One conversion from end to end."""

    D: int
    V: int
    R: int
    states: int
    minutes: float
    peak_gib: float


class RealSize(Results):
    """What ``--json`` writes."""

    kind: Literal["convert-real-size"] = "convert-real-size"
    rows: list[Row]


def write_drafter(folder: Path) -> None:
    """Random weights; the head's rows shrink along random directions, as trained ones do."""
    kv = D * KV_HEADS // HEADS
    shapes = {
        "fc.weight": (D, 3 * D),
        "norm.weight": (D,),
        "midlayer.hidden_norm.weight": (D,),
        "midlayer.input_layernorm.weight": (D,),
        "midlayer.post_attention_layernorm.weight": (D,),
        "midlayer.self_attn.q_proj.weight": (D, 2 * D),
        "midlayer.self_attn.k_proj.weight": (kv, 2 * D),
        "midlayer.self_attn.v_proj.weight": (kv, 2 * D),
        "midlayer.self_attn.o_proj.weight": (D, D),
        "midlayer.mlp.gate_proj.weight": (FF, D),
        "midlayer.mlp.up_proj.weight": (FF, D),
        "midlayer.mlp.down_proj.weight": (D, FF),
        "lm_head.weight": (V, D),
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")


def write_states(folder: Path) -> None:
    """States that live mostly in some directions, a cycle of K from each place of each document."""
    writer = StatesWriter(folder, {"target": "synthetic", "drafter": "synthetic", "K": K})
    scale = torch.logspace(0, -2, D, dtype=torch.bfloat16)
    group = DOCUMENTS // 20
    firsts = range(0, DOCUMENTS, group)
    for first in steps(firsts, "Head states", len(firsts), "group"):
        places = STATES // DOCUMENTS // K
        step = torch.arange(K).repeat(places * group)
        pos = torch.arange(places).repeat_interleave(K).repeat(group) + step
        doc = torch.arange(first, first + group).repeat_interleave(places * K)
        hidden = torch.empty(len(pos), D, dtype=torch.bfloat16).normal_() * scale
        writer.write(first // group, Rows(hidden, doc, step, pos, torch.randint(V, (len(pos),))))
    writer.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    with claim_results(args.json):
        run(args.folder, args.json)


def run(folder: Path, json: Path | None) -> None:
    """Write the drafter and its states, convert it, and say how long that took and what memory."""
    if not (folder / "drafter").exists():
        write_drafter(folder / "drafter")
    if not (folder / "states" / "index.json").exists():
        write_states(folder / "states")
    command = ["convert", str(folder / "drafter"), "--hidden-states", str(folder / "states")]
    command += ["--rank", str(R), "--force", "--output-path", str(folder / "slim")]
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "vllm_slimspec", "convert", *command[1:]], check=True)
    minutes = (time.monotonic() - start) / 60
    gigabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"{minutes:.1f} minutes, {gigabytes:.1f} GiB at most")
    if json:
        row = Row(D=D, V=V, R=R, states=STATES, minutes=round(minutes, 2), peak_gib=round(gigabytes, 2))
        RealSize(rows=[row], device=device_name(torch.device("cpu")), **provenance()).write(json)


if __name__ == "__main__":
    with one_line_errors():
        main()
