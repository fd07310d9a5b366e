"""Make a checkpoint whose layer is the target's last one, to start a drafter from.

Starting from it did not help: see README.md.

    python experiments/smollm2/start_from_target.py RUN/checkpoints/0 TARGET_FOLDER STATES OUTPUT
    slimspec train fit ... --from-pretrained OUTPUT

RUN is any run of `slimspec train fit --max-steps 1` with a low-rank head, and STATES is what it was trained on. The
state of the highest layer that the drafter reads goes through `fc` unchanged, and meets the attention, the MLP and the
norms of the target's last layer. The half of the projections that reads embeddings stays random.
"""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vllm_slimspec.train.store import read_state, state_file

DOCUMENTS = 20  # whose states say how large they are


def size_of_states(folder: Path) -> float:
    """Return the median root mean square of the states of the highest layer that the drafter reads."""
    states = torch.cat([read_state(state_file(folder, i))["hidden_states"][:, -2] for i in range(DOCUMENTS)])
    return float(states.float().pow(2).mean(dim=1).sqrt().median())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "target", "states", "output"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    tensors = load_file(arguments.checkpoint / "model.safetensors")
    target = {name: tensor.float() for name, tensor in load_file(arguments.target / "model.safetensors").items()}
    last = f"model.layers.{max(int(name.split('.')[2]) for name in target if '.layers.' in name)}."
    size = len(tensors["norm.weight"])

    tensors["fc.weight"] = torch.cat([torch.zeros(size, 2 * size), torch.eye(size)], dim=1)
    tensors["norm.weight"] = target["model.norm.weight"]
    for name in ("q_proj", "k_proj", "v_proj"):
        ours = f"layers.0.self_attn.{name}.weight"
        theirs = target[f"{last}self_attn.{name}.weight"] * target[f"{last}input_layernorm.weight"]
        tensors[ours] = torch.cat([tensors[ours][:, :size], theirs], dim=1)
    scale = size_of_states(arguments.states)  # the drafter's layer adds to normalized states, the target's to these
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"layers.0.{name}.weight"] = target[f"{last}{name}.weight"] / scale
    for name in ("mlp.gate_proj", "mlp.up_proj", "post_attention_layernorm"):
        tensors[f"layers.0.{name}.weight"] = target[f"{last}{name}.weight"]

    arguments.output.mkdir(parents=True)
    shutil.copy(arguments.checkpoint / "config.json", arguments.output)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, arguments.output / "model.safetensors")


if __name__ == "__main__":
    main()
