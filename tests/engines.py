"""vLLM engines in the test's own process: how they are started, asked and watched."""

import os
from dataclasses import dataclass

import torch

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

OPTIONS = {
    "dtype": "float32",  # so that equality of outputs is exact
    "max_model_len": 256,
    "max_num_seqs": 8,
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
    "disable_log_stats": False,
}
TOKENS = 48


@dataclass
class Recorded:
    """What the drafter was asked and answered while an engine ran."""

    fused: list[tuple[torch.Tensor, torch.Tensor]]  # hidden states [B, D] and target ids [B] of get_top_tokens
    dense: int  # calls of compute_logits


def record(model) -> Recorded:
    """Watch a live draft model; what it answers stays the same."""
    seen = Recorded([], 0)
    get_top_tokens, compute_logits = model.get_top_tokens, model.compute_logits

    def fused(hidden):
        ids = get_top_tokens(hidden)
        seen.fused.append((hidden.clone(), ids.clone()))
        return ids

    def dense(hidden):
        seen.dense += 1
        return compute_logits(hidden)

    model.get_top_tokens, model.compute_logits = fused, dense
    return seen


def drafter_of(llm):
    """The draft model inside an engine of this process."""
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    return runner.drafter.model


def generate(llm, prompts, tokens=TOKENS, **sampling):
    """Greedy token ids for each prompt, all prompts in one batch."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, **sampling)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in outputs]
