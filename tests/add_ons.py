"""Tiny targets with an MTP layer, and head add-ons for them, on disk."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_slimspec.drafters.add_on import FORMAT, KEY, SAMPLE_IDS, SAMPLE_ROWS
from vllm_slimspec.head.spec import DENSE, DOWN, UP

V, D, R, INNER, LAYERS = 512, 64, 24, 96, 2


def config(**changes):
    """Return the config.json of a MiMo model: Qwen2 layers, and one MTP layer."""
    return {
        "model_type": "qwen2",
        "architectures": ["MiMoForCausalLM"],
        "num_nextn_predict_layers": 1,
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "rope_theta": 10000.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
    } | changes


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return the tensors of such a model, random, but with an MTP layer that guesses many of its tokens.

    Both the target and its MTP layer choose a token mostly by the embedding of the one before. What attention and the
    MLPs add to it is what the MTP layer cannot guess.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    def layer(prefix: str) -> dict[str, torch.Tensor]:
        shapes = {
            **{f"self_attn.{name}_proj.weight": (size, D) for name, size in (("q", D), ("k", D // 2), ("v", D // 2))},
            "self_attn.o_proj.weight": (D, D),
            "mlp.gate_proj.weight": (INNER, D),
            "mlp.up_proj.weight": (INNER, D),
            "mlp.down_proj.weight": (D, INNER),
        }
        biases = {
            f"{prefix}self_attn.{name}_proj.bias": torch.zeros(shapes[f"self_attn.{name}_proj.weight"][0])
            for name in "qkv"
        }
        norms = {f"{prefix}{name}.weight": torch.ones(D) for name in ("input_layernorm", "post_attention_layernorm")}
        added = {"self_attn.o_proj.weight": 0.3, "mlp.down_proj.weight": 0.3}
        made = {prefix + name: random(*shape) * added.get(name, 1.0) for name, shape in shapes.items()}
        return made | biases | norms

    made = {
        "model.embed_tokens.weight": random(V, D) * D**0.5,
        DENSE: random(V, D) * 4,
        "model.norm.weight": torch.ones(D),
    }
    for index in range(LAYERS):
        made |= layer(f"model.layers.{index}.")
    mtp = "model.mtp_layers.0."
    made |= layer(mtp) | {f"{mtp}input_proj.weight": torch.cat([torch.zeros(D, D), torch.eye(D)], dim=1)}
    norms = ("token_layernorm", "hidden_layernorm", "final_layernorm")
    return made | {f"{mtp}{name}.weight": torch.ones(D) for name in norms}


def write_target(folder: Path, seed: int = 0, **changes) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(**changes)))
    save_file(tensors(seed), folder / "model.safetensors", {"format": "pt"})
    return folder


def factors(rank: int = R, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return down [R, D] and up [V, R] of a plain SVD of that target's head."""
    left, values, right = torch.linalg.svd(tensors(seed)[DENSE], full_matrices=False)
    return right[:rank].contiguous(), (left[:, :rank] * values[:rank]).contiguous()


def write_add_on(
    folder: Path,
    target: Path,
    head: dict[str, torch.Tensor] | None = None,
    seed: int = 0,
    sampled: bool = True,
    method: str = "mtp",
    **changes,
) -> Path:
    """Write an add-on with the factors of a target's head, or with other tensors, and further keys in its config."""
    folder.mkdir(parents=True)
    if head is None:
        down, up = factors(seed=seed)
        head = {DOWN: down, UP: up}
    ids = torch.arange(0, V, V // 64)
    samples = {SAMPLE_IDS: ids, SAMPLE_ROWS: tensors(seed)[DENSE][ids].contiguous()}
    described = {"format": FORMAT, "method": method, "base_model": str(target)}
    content = {KEY: described, "hidden_size": D, "vocab_size": V, "lm_head_rank": len(head[DOWN])} | changes
    (folder / "config.json").write_text(json.dumps(content))
    save_file(head | (samples if sampled else {}), folder / "model.safetensors", {"format": "pt"})
    return folder
