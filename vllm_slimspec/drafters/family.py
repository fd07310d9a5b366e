"""The description of a family of drafters: how its folders are recognized, and which vLLM model serves it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """A draft model of vLLM, and the low-rank draft model that is made from it.

    To add a family, add it in a file of this package and in :data:`vllm_slimspec.drafters.FAMILIES`. No other code
    names a family.
    """

    name: str  # the model_type in config.json
    method: str  # vLLM's speculative method
    architecture: str  # the architecture in config.json of a drafter with a low-rank head
    model: str  # the class in vllm_slimspec.drafters.served that serves such a drafter
    stock: str  # vLLM's draft model with a dense head, from which that class is made: "module:class"
    dense_architecture: str  # vLLM's name for a dense drafter in config.json
    other_architectures: tuple[str, ...]  # names that other tools write in config.json for a dense drafter
    defaults: Mapping[str, Any]  # transformers' defaults for the model type, for the keys that vLLM's draft model reads
    silent_rope_theta: float = 10000.0  # vLLM's rope_theta for a speculators config without rope parameters
    silent_max_positions: int | None = None  # vLLM's max_position_embeddings for a speculators config without the key
    windows_by_layer_types: bool = False  # whether layer_types alone turns a sliding window on in a speculators config
    aux_count_keys: tuple[str, ...] = ("num_aux_hidden_states",)  # keys that set the width of fc; the first one wins
    counts_named_layers: bool = False  # whether layer ids at the top of the config also set the width of fc
    query_key_norms: bool = False  # whether attention normalizes queries and keys
    outer_biases: bool = False  # whether attention's output and the MLP may have biases
