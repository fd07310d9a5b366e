"""What a family of drafters is: where in a vLLM draft model the head goes, and how its folders are recognized."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """One kind of draft model that vLLM has, and the low-rank draft model that is made of it.

    A family is a file of this package and a row of :data:`vllm_slimspec.drafters.FAMILIES`; nothing else names it.
    """

    name: str  # the model_type in config.json
    method: str  # vLLM's speculative method
    architecture: str  # of a drafter with a low-rank head, in config.json
    model: str  # the class that serves it, in vllm_slimspec.drafters.served
    stock: str  # vLLM's draft model with a dense head, which that class is made of: "module:class"
    dense_architecture: str  # vLLM's own name for it in config.json
    other_architectures: tuple[str, ...]  # what other tools write in config.json for a dense one
    defaults: Mapping[str, Any]  # of transformers' class of the model type, where vLLM's draft model reads the key
    silent_rope_theta: float = 10000.0  # vLLM's, of a speculators config that says nothing of its rope
    aux_count_keys: tuple[str, ...] = ("num_aux_hidden_states",)  # config keys that size fc, the first one wins
    counts_named_layers: bool = False  # whether layer ids at the top of the config size fc as well
    query_key_norms: bool = False  # whether attention normalizes queries and keys
    outer_biases: bool = False  # whether attention's output and the MLP may have biases
