"""Targets and EAGLE-3 drafters with the shapes of public models and random weights, to measure time only.

A target is a folder that holds only config.json, for vLLM's ``load_format="dummy"``. A drafter has weights on disk,
because a dummy drafter would have random numbers in its vocabulary map too, which point outside of the vocabulary.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine_heads import EngineHead
from vllm_slimspec.common.files import save_tensors
from vllm_slimspec.common.output import claim_folder, write_whole
from vllm_slimspec.drafters.eagle3 import LLAMA
from vllm_slimspec.head.spec import DENSE, DOWN, UP
from vllm_slimspec.measure.shapes import Shape
from vllm_slimspec.measure.timed_heads import Weights, trimmed_offsets

RIVAL_ARCHITECTURE = "SlimSpecRivalLlamaForCausalLMEagle3"
"""The architecture of a stock drafter with the head that ``rival_head`` names: see :mod:`cycle_worker`."""

DTYPE = "bfloat16"  # the dtype of all random weights

_LLAMA_3 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_QWEN_3 = {
    "vocab_size": 151936,
    "head_dim": 128,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
TARGETS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        **_LLAMA_3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_scaling": {**_LLAMA_3_ROPE, "factor": 32.0},
    },
    "llama-3.1-8b": {
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rope_scaling": {**_LLAMA_3_ROPE, "factor": 8.0},
    },
    "qwen3-8b": {
        **_QWEN_3,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
    },
    "qwen3-30b-a3b": {
        **_QWEN_3,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "swiglu_limit": 7.0,
        "attention_bias": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "eos_token_id": 200002,
        "pad_token_id": 199999,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    },
}


_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
# The drafter of a mixture of experts has a dense layer. This is the width that SpecForge gives it.
_DENSE_LAYER = {"gpt_oss": {"intermediate_size": 17280}}


def write_target(folder: Path, config: dict[str, Any]) -> Path:
    """Write a folder with ``config`` as its config.json, for dummy weights, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": DTYPE}, indent=2) + "\n")
    return folder


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer into a target's folder. Its tokens are the words t0, t1, ..., separated by spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({f"t{i}": i for i in range(vocab_size)}, unk_token="t0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def write_drafter(folder: Path, target: dict[str, Any], rank: int, head: EngineHead) -> Path:
    """Write a drafter with random weights into the subfolder of ``folder`` that has the head's name, and return it.

    The drafter has one decoder layer of the target's width. All heads are made from one dense head, and the drafters in
    a ``folder`` share their files. A drafter that already exists is kept.

    Args:
        folder: where the drafters of a target are kept.
        target: the target's config.json.
        rank: rank of a low-rank head.
        head: the head of the drafter.

    Raises:
        OSError: the drafter cannot be written; no partial drafter is left.
    """
    config = _drafter_config(target, rank, head)
    path = folder / head.name
    if _is_made_from(path, config):
        return path
    shutil.rmtree(path, ignore_errors=True)
    with claim_folder(path) as claim:
        files = {part: _part(folder, config, rank, part) for part in _parts(head)}

        def fill(new: Path) -> None:
            for part, file in files.items():
                os.link(file, new / f"{part}.safetensors")
            (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")

        claim.write(fill)
    return path


def _is_made_from(path: Path, config: dict[str, Any]) -> bool:
    file = path / "config.json"
    return file.is_file() and json.loads(file.read_text()) == config


def _drafter_config(target: dict[str, Any], rank: int, head: EngineHead) -> dict[str, Any]:
    layers = target["num_hidden_layers"]
    config = {key: target[key] for key in (*_SIZES, "rms_norm_eps", "rope_theta", "max_position_embeddings")}
    config |= _DENSE_LAYER.get(target["model_type"], {}) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "draft_vocab_size": head.rows or target["vocab_size"],
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": DTYPE,
        "eagle_aux_hidden_state_layer_ids": [2, layers // 2, layers - 3],
    }
    if head.family == "low-rank":
        config |= {"architectures": [LLAMA.architecture], **head.low_rank_keys(rank)}
    elif head.is_rival:
        config |= {"architectures": [RIVAL_ARCHITECTURE], "rival_head": head.name, "rival_rank": rank}
    return config


def _parts(head: EngineHead) -> list[str]:
    """Return the names of a drafter's files: its layer, and the weights of its head."""
    if head.rows:
        return ["body", "trimmed"]
    if head.family != "low-rank":
        return ["body", "dense"]
    return ["body", "factors", *(["dense"] if head.rerank else [])]


def _part(folder: Path, config: dict[str, Any], rank: int, part: str) -> Path:
    """Return a file of random weights, and write it first if none of these sizes exists."""
    key = hashlib.sha256(json.dumps([part, rank, *(config[size] for size in _SIZES)]).encode()).hexdigest()[:12]
    file = folder / f"{part}-{key}.safetensors"
    if not file.is_file():
        tensors = _body(config) if part == "body" else _head(config, rank, part)
        write_whole(file, lambda part: save_tensors(tensors, part, {"format": "pt"}))
    return file


def _head(config: dict[str, Any], rank: int, part: str) -> dict[str, Tensor]:
    shape = Shape(config["hidden_size"], config["vocab_size"], rank)
    weights = Weights(shape, torch.bfloat16, torch.device("cpu"))
    if part == "factors":
        return {DOWN: weights.down, UP: weights.up}
    if part == "dense":
        return {DENSE: weights.dense}
    rows = config["draft_vocab_size"]
    return {DENSE: weights.dense[:rows].clone(), "d2t": trimmed_offsets(rows, shape.vocab_size)}


def _body(config: dict[str, Any]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(std=columns**-0.5, generator=generator)

    width, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    tensors = {
        "fc.weight": normal(width, 3 * width),
        "midlayer.self_attn.q_proj.weight": normal(q, 2 * width),
        "midlayer.self_attn.k_proj.weight": normal(kv, 2 * width),
        "midlayer.self_attn.v_proj.weight": normal(kv, 2 * width),
        "midlayer.self_attn.o_proj.weight": normal(width, q),
        "midlayer.mlp.gate_proj.weight": normal(inner, width),
        "midlayer.mlp.up_proj.weight": normal(inner, width),
        "midlayer.mlp.down_proj.weight": normal(width, inner),
        "norm.weight": torch.ones(width, dtype=torch.bfloat16),
    }
    for norm in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
        tensors[f"midlayer.{norm}.weight"] = torch.ones(width, dtype=torch.bfloat16)
    return tensors
