"""Write tiny EAGLE-3 drafter folders with random weights, which are right unless a test spoils them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

D, R, V = 64, 8, 128
HEADS, KV_HEADS, HEAD_DIM, FF = 2, 1, 32, 96


def config(**changes: Any) -> dict[str, Any]:
    """Return the config.json of a SlimSpec drafter; a change to None removes the key."""
    base = {
        "architectures": ["SlimSpecLlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": D,
        "intermediate_size": FF,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": V,
        "draft_vocab_size": V,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
        "lm_head_rank": R,
    }
    return {key: value for key, value in (base | changes).items() if value is not None}


def tensors(draft_vocab: int = V, rank: int = R, seed: int = 0, family: str = "llama") -> dict[str, torch.Tensor]:
    """Return the body and the factors; with a map onto every other id when ``draft_vocab`` is below V."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.05

    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    out = {
        "fc.weight": random(D, 3 * D),
        "norm.weight": torch.ones(D),
        "midlayer.self_attn.q_proj.weight": random(q, 2 * D),
        "midlayer.self_attn.k_proj.weight": random(kv, 2 * D),
        "midlayer.self_attn.v_proj.weight": random(kv, 2 * D),
        "midlayer.self_attn.o_proj.weight": random(D, q),
        "midlayer.mlp.gate_proj.weight": random(FF, D),
        "midlayer.mlp.up_proj.weight": random(FF, D),
        "midlayer.mlp.down_proj.weight": random(D, FF),
        "lm_head.down.weight": random(rank, D),
        "lm_head.up.weight": random(draft_vocab, rank),
    }
    for norm in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
        out[f"midlayer.{norm}.weight"] = torch.ones(D)
    if family == "qwen3":
        for norm in ("q_norm", "k_norm"):
            out[f"midlayer.self_attn.{norm}.weight"] = torch.ones(HEAD_DIM)
    if draft_vocab < V:
        out["d2t"] = torch.arange(draft_vocab) * (V // draft_vocab) - torch.arange(draft_vocab)
    return out


def tiered(drafter: dict[str, torch.Tensor], frequent: int) -> dict[str, torch.Tensor]:
    """Return the tensors of the drafter with exact rows of ``frequent`` tokens, near the product of the factors."""
    generator = torch.Generator().manual_seed(5)
    down, up = drafter["lm_head.down.weight"], drafter["lm_head.up.weight"]
    order = torch.randperm(len(up), generator=generator)
    ids, tail = order[:frequent].sort().values, order[frequent:].sort().values
    rows = up[ids] @ down
    out = drafter | {
        "lm_head.up.weight": up[tail],
        "lm_head.frequent.weight": rows + rows.std() * torch.randn(rows.shape, generator=generator),
        "lm_head.frequent.ids": ids,
        "lm_head.tail.row": rows.std() * torch.randn(D, generator=generator),
        "lm_head.tail.bias": torch.full((1,), 0.02),
    }
    return out | ({"lm_head.weight": drafter["lm_head.weight"][tail]} if "lm_head.weight" in drafter else {})


def tail_ids(tiered: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the draft ids that have no exact row in the tensors of a tiered drafter."""
    ids = tiered["lm_head.frequent.ids"]
    return torch.tensor(sorted(set(range(len(ids) + len(tiered["lm_head.up.weight"]))) - set(ids.tolist())))


def tiered_scores(
    tiered: dict[str, torch.Tensor],
    hidden: torch.Tensor,
    up: torch.Tensor | None = None,
    rescore: Callable[[torch.Tensor], torch.Tensor] = lambda tail: tail,
) -> torch.Tensor:
    """Score every draft id by the tensors of a tiered drafter: [..., D] -> [..., V].

    ``up`` is the dequantized factor of a quantized head. ``rescore`` takes the scores of the tail and returns others.
    """
    up = tiered["lm_head.up.weight"] if up is None else up
    offset = hidden @ tiered["lm_head.tail.row"] + tiered["lm_head.tail.bias"]
    tail = hidden @ tiered["lm_head.down.weight"].T @ up.T + offset[..., None]
    ids = tiered["lm_head.frequent.ids"]
    out = hidden.new_empty(*hidden.shape[:-1], len(ids) + len(up))
    out[..., ids] = hidden @ tiered["lm_head.frequent.weight"].T
    out[..., tail_ids(tiered)] = rescore(tail)
    return out


def rescored(found: torch.Tensor, exact: torch.Tensor, k: int, ranks: int = 1) -> torch.Tensor:
    """Return the exact scores of the k best of ``found`` [..., V] on each rank, and -inf for all others."""
    candidates = torch.zeros_like(found, dtype=torch.bool)
    of_a_rank = -(-found.shape[-1] // 64) * 64 // ranks  # vLLM pads the vocabulary to 64 entries
    for entries in torch.arange(found.shape[-1]).split(of_a_rank):  # every rank scores its best again
        candidates.scatter_(-1, entries[found[..., entries].topk(min(k, len(entries)), dim=-1).indices], True)
    return exact.masked_fill(~candidates, -torch.inf)


def dense(drafter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of the stock drafter with the same head, as the product of the factors."""
    out = {name: t for name, t in drafter.items() if not name.startswith("lm_head.")}
    out["lm_head.weight"] = drafter["lm_head.up.weight"] @ drafter["lm_head.down.weight"]
    return out


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """Write a drafter folder without any check, so that wrong folders can be made."""
    import json

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
