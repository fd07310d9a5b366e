"""Model Runner V2, which every GPU user gets, on a CPU: `python run_v2.py JOB.json RESULT.json`.

V2 needs Triton: here that is Triton's interpreter, behind a backend that compiles nothing (cpu_backend/). Both have to
be in place before Triton is first imported, hence a process of its own, with the environment that test_v2.py gives it.
A job maps names to calls of the functions below, {"call": "serve", ...arguments}; the result maps the same names to
what they returned.
"""

import gc
import json
import os
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from vllm import LLM, SamplingParams

from vllm_slimspec.engine.acceptance import from_engine
from vllm_slimspec.head.spec import DOWN, UP
from vllm_slimspec.kernels import low_rank_argmax as kernel


def serve(target, batches, drafter=None, impl="auto", **speculative):
    """Run one engine: return what each batch answered, and how the drafter was asked meanwhile."""
    os.environ["SLIMSPEC_IMPL"] = impl
    llm = LLM(
        model=target,
        speculative_config=drafter and {"model": drafter} | speculative,
        dtype="float32",  # so that equality of outputs is exact
        max_model_len=256,
        max_num_seqs=512,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
    )
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    result: dict[str, Any] = {"runner": type(runner).__module__, "batches": []}
    watched = Watched(runner.speculator.model, drafter) if drafter else None
    for batch in batches:
        if batch.pop("lie", False):
            lie(runner.speculator)
        before = from_engine(llm)
        answer = {"tokens": generate(llm, **batch)}
        counted = from_engine(llm) - before
        result["batches"].append(answer | {"drafts": counted.drafts, "accepted": counted.per_position})
    if watched:
        kernel.low_rank_argmax = watched.launch
        result |= {name: getattr(watched, name) for name in ("fused", "dense", "wrong", "launched")}
    return result


def generate(llm, prompts, tokens, temperature=0.0, seed=None):
    """Answer all prompts in one batch; request i samples with ``seed + i``."""
    params = [
        SamplingParams(
            temperature=temperature,
            seed=None if seed is None else seed + i,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
        )
        for i in range(len(prompts))
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


class Watched:
    """A live draft model that counts how it is asked, and checks its drafts with torch and the factors on disk."""

    def __init__(self, model, drafter):
        self.fused = self.dense = self.wrong = self.launched = 0
        tensors = load_file(Path(drafter) / "model.safetensors")
        self.down, self.up, self.d2t = tensors[DOWN], tensors[UP], tensors.get("d2t")
        self.get_top_tokens, self.compute_logits = model.get_top_tokens, model.compute_logits
        model.get_top_tokens, model.compute_logits = self.top_tokens, self.logits
        self.launch, kernel.low_rank_argmax = kernel.low_rank_argmax, self.low_rank_argmax

    def top_tokens(self, hidden):
        ids = self.get_top_tokens(hidden)
        expected = (hidden @ self.down.T @ self.up.T).argmax(dim=1)
        if self.d2t is not None:
            expected = expected + self.d2t[expected]
        self.fused += 1
        self.wrong += int((ids != expected).sum())
        return ids

    def logits(self, hidden):
        self.dense += 1
        return self.compute_logits(hidden)

    def low_rank_argmax(self, *args, **kwargs):
        self.launched += 1
        return self.launch(*args, **kwargs)


def lie(speculator):
    """Sample drafts from one distribution from now on, and give the rejection sampler a flatter one."""
    sample_draft = speculator.sample_draft

    def sample_and_lie(hidden, positions, requests, temperature, seeds, step, logits, *rest):
        tokens = sample_draft(hidden, positions, requests, temperature, seeds, step, logits, *rest)
        logits[requests, step] *= 0.5
        return tokens

    speculator.sample_draft = sample_and_lie


def samplers():
    """Return what vLLM's samplers draw: in the stub's interpreter, then in Triton's own, one program after another."""
    from triton_stub import interpreter as stub

    drawn = [_draw()]
    stub.GridExecutor.__call__ = stub.one_by_one
    drawn.append(_draw())
    stub.GridExecutor.__call__ = stub.launch
    return drawn


def _draw(requests=8, vocab=40, k=2):
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

    generator = torch.Generator().manual_seed(0)
    rows = requests * (k + 1)
    logits = torch.randn(rows, vocab, generator=generator)
    draft_logits = torch.randn(requests, k, vocab, generator=generator)
    drafts = torch.randint(-1, vocab, (rows,), generator=generator)  # -1: no draft
    drafts[1 :: k + 1] = logits[:: k + 1].argmax(dim=1)  # so that greedy requests accept some
    request, steps = torch.arange(requests), torch.arange(k + 1)
    temperature = torch.tensor([0.0, 1.0]).repeat(requests // 2)
    positions, of_request = (steps + 3).repeat(requests), request.repeat_interleave(k + 1)
    since_0_30 = {"is_drafting": False} if "is_drafting" in signature(gumbel_sample).parameters else {}
    drawn = [gumbel_sample(logits[::3], request, temperature, request, positions[::3], True, **since_0_30).tolist()]
    bounds = torch.arange(requests + 1, dtype=torch.int32) * (k + 1)
    common = (drafts, bounds, positions, request, of_request, steps.repeat(requests), temperature, request, k)
    for proposal, options in (
        (None, {}),
        (draft_logits, {}),
        (None, {"synthetic_conditional_rates": torch.tensor([0.7, 0.3])}),
        (draft_logits, {"use_block_verification": True}),
    ):
        tokens, counts = rejection_sample(logits, proposal, *common, **options)
        drawn.append([row[:count] for row, count in zip(tokens.tolist(), counts.tolist(), strict=True)])
    return drawn


def main(job, result):
    answers = {}
    for name, call in json.loads(Path(job).read_text()).items():
        answers[name] = {"serve": serve, "samplers": samplers}[call.pop("call")](**call)
        gc.collect()  # an engine's memory, before the next one starts
    Path(result).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
