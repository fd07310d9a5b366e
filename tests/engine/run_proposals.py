"""What a real engine's proposer returns, beside what the draft head chose: `python run_proposals.py JOB.json FOLDER`.

A process of its own, because what decides on the model runner has to be in its environment from the start; one engine
after another, because an engine starts faster than vLLM is imported. A job maps names to the arguments of
:func:`serve`, and FOLDER gets NAME.pt of each: see :meth:`Watched.watched`.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams

from vllm_slimspec.drafters import draft
from vllm_slimspec.head import slot
from vllm_slimspec.kernels import low_rank_topk


class Watched:
    """Methods mixed into vLLM's worker, which record its proposer and the draft model in it."""

    model_runner: Any  # of the worker that this is mixed into

    def watch(self, spoil: bool) -> None:
        """Record from now on. With ``spoil``, vLLM gets what the head returns as it is, without a contiguous copy."""
        if spoil:
            draft.hand_over = slot.hand_over = lambda tensor, dtype: tensor
        runner = self.model_runner
        self.proposer = getattr(runner, "speculator", None) or runner.drafter  # V2's, V1's
        self.calls, self.chosen = [], []
        propose, model = self.proposer.propose, self.proposer.model
        get_top_tokens, compute_logits = model.get_top_tokens, model.compute_logits

        def proposed(*args, **kwargs):
            self.chosen.clear()
            tokens = propose(*args, **kwargs)
            paths, hidden, ids = zip(*self.chosen, strict=True)
            call = {"proposed": tokens.clone(), "chosen": torch.stack(ids, 1), "hidden": torch.stack(hidden, 1)}
            self.calls.append(call | {"paths": set(paths)})
            return tokens

        def fused(hidden):
            ids = get_top_tokens(hidden)
            self.chosen.append(("fused", hidden.clone(), ids.clone()))
            return ids

        def dense(hidden):
            logits = compute_logits(hidden)
            self.chosen.append(("dense", hidden.clone(), logits.argmax(dim=1)))
            return logits

        self.proposer.propose, model.get_top_tokens, model.compute_logits = proposed, fused, dense

    def watched(self) -> dict:
        """Return the runner and all calls of ``propose``: B requests, K positions, B no longer the same once one ends.

        ``proposed`` [B, K] is what the call returned, ``chosen`` [B, K] what the head chose meanwhile, ``hidden``
        [B, K, D] what it was asked for, ``paths`` by which of its methods.
        """
        return {"runner": type(self.model_runner).__module__, "calls": self.calls}


def serve(target, drafter, prompts, tokens, impl="auto", spoil=False, speculative=None, **options):
    """Answer all prompts in one batch, greedily -> :meth:`Watched.watched` of every tensor-parallel rank."""
    os.environ["SLIMSPEC_IMPL"] = impl
    llm = LLM(
        model=target,
        speculative_config={"model": drafter, "num_speculative_tokens": 3} | (speculative or {}),
        worker_extension_cls="run_proposals.Watched",
        max_model_len=256,
        max_num_seqs=8,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        **{"dtype": "float32"} | options,
    )
    llm.collective_rpc("watch", args=(spoil,))
    params = [  # so that they end one by one
        SamplingParams(temperature=0, max_tokens=tokens + i, ignore_eos=True, detokenize=False)
        for i in range(len(prompts))
    ]
    llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return llm.collective_rpc("watched")


def main(job, folder):
    low_rank_topk.CHUNK = 32  # Triton's interpreter takes half a second to sort 1024 groups
    hand_over = draft.hand_over
    for name, arguments in json.loads(Path(job).read_text()).items():
        torch.save(serve(**arguments), Path(folder) / f"{name}.pt")
        draft.hand_over = slot.hand_over = hand_over
        gc.collect()  # an engine's memory, before the next one starts


if __name__ == "__main__":
    main(*sys.argv[1:])
