"""The families of EAGLE-3 drafters (arXiv 2503.01840): one layer over the target's hidden states, and a head."""

from vllm_slimspec.drafters.family import Family

LLAMA = Family(
    name="llama",
    method="eagle3",
    architecture="SlimSpecLlamaForCausalLMEagle3",
    model="SlimSpecLlamaForCausalLM",
    stock="vllm.model_executor.models.llama_eagle3:Eagle3LlamaForCausalLM",
    dense_architecture="LlamaForCausalLMEagle3",
    other_architectures=("Eagle3LlamaForCausalLM", "LlamaForCausalLM"),
    defaults={
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    },
    silent_max_positions=8192,
    outer_biases=True,
)
"""The family of most public EAGLE-3 drafters, for targets of every architecture."""

QWEN3 = Family(
    name="qwen3",
    method="eagle3",
    architecture="SlimSpecQwen3ForCausalLMEagle3",
    model="SlimSpecQwen3ForCausalLM",
    stock="vllm.model_executor.models.qwen3_eagle3:Eagle3Qwen3ForCausalLM",
    dense_architecture="Eagle3Qwen3ForCausalLM",
    other_architectures=("Qwen3ForCausalLMEagle3", "Qwen3ForCausalLM"),
    defaults={
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    silent_rope_theta=1000000.0,
    windows_by_layer_types=True,
    aux_count_keys=("num_aux_layers", "num_aux_hidden_states"),
    counts_named_layers=True,
    query_key_norms=True,
)
"""The family of drafters with a Qwen3 layer, which normalizes queries and keys."""
