"""SlimSpec drafters with a Qwen3 layer (query and key norms)."""

from vllm.model_executor.models.qwen3_eagle3 import Eagle3Qwen3ForCausalLM

from vllm_slimspec.models.draft import LowRankDraft


class SlimSpecQwen3ForCausalLM(LowRankDraft, Eagle3Qwen3ForCausalLM):
    """vLLM's Eagle3Qwen3ForCausalLM under a low-rank head."""
