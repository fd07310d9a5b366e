"""SlimSpec drafters with a Llama layer, which most public EAGLE-3 drafters have, whatever their target."""

from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM

from vllm_slimspec.models.draft import LowRankDraft

RELEASE = "0.2.0"  # vLLM caches what it finds out of the class under a hash of this file alone


class SlimSpecLlamaForCausalLM(LowRankDraft, Eagle3LlamaForCausalLM):
    """vLLM's Eagle3LlamaForCausalLM under a low-rank head."""
