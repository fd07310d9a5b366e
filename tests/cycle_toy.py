"""A pair of toy shape for `benchmarks/cycle.py`, whose vocabulary is still above the trimmed one."""

from random_pairs import TARGETS
from vllm_slimspec.measure.shapes import Shape

SHAPE = Shape(128, 70000, 16)
CONFIG = TARGETS["llama-3.2-1b"] | {
    "vocab_size": SHAPE.vocab_size,
    "hidden_size": SHAPE.hidden_size,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the smallest that vLLM's CPU attention takes
    "bos_token_id": 0,
    "eos_token_id": 1,
}
