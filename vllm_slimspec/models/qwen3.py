"""SlimSpec drafters with a Qwen3 layer (query and key norms)."""

from vllm.model_executor.models.qwen3_eagle3 import Eagle3Qwen3ForCausalLM

from vllm_slimspec.models.draft import LowRankDraft

RELEASE = "0.2.0"  # vLLM caches what it finds out of the class under a hash of this file alone


class SlimSpecQwen3ForCausalLM(LowRankDraft, Eagle3Qwen3ForCausalLM):
    """vLLM's Eagle3Qwen3ForCausalLM under a low-rank head."""
