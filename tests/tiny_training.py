"""A random target and its hidden states, small enough for a training run of a second."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from vllm_slimspec.engine.head_states import Document
from vllm_slimspec.train.states import write_states

V, D, R, DRAFT_V = 96, 32, 4, 40
LAYERS = [0, 1, 3]
SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
FLAGS: dict[str, Any] = {
    "rank": R,
    "epochs": 2,
    "lr": 3e-3,
    "scheduler_warmup_steps": 2,
    "total_seq_len": 96,
    "hidden_states_dtype": "float32",
}
DOCUMENTS = [Document(step, [(i * step + step) % V for i in range(24)], 0) for step in range(1, 31)]
TOKENS = [document.tokens for document in DOCUMENTS]


def write_work(folder: Path) -> Path:
    """Write two random targets, ``llama`` and ``qwen3``, and the hidden states of the first, ``states``."""
    torch.manual_seed(0)
    for name, config in (("llama", LlamaConfig), ("qwen3", Qwen3Config)):
        model = AutoModelForCausalLM.from_config(config(**SHAPE), dtype=torch.float32)
        torch.nn.init.normal_(model.lm_head.weight)  # a target with opinions: something to learn
        model.save_pretrained(folder / name)
    write_states(folder / "llama", DOCUMENTS, folder / "states", layer_ids=LAYERS, dtype="float32")
    return folder
