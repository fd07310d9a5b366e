"""Start, ask and watch vLLM engines in the test's own process, and run scripts with engines in other processes."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

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

V1_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
V2_ENVIRONMENT = V1_ENVIRONMENT | {
    # Where Triton and vLLM find the stub's entry points.
    "PYTHONPATH": str(Path(__file__).parent / "engine/v2/cpu_backend"),
    "TRITON_INTERPRET": "1",
}


@dataclass
class Script:
    """A Python script that runs engines, in a process and with an environment of its own."""

    command: list[str | Path]
    environment: dict[str, str]  # its PYTHONPATH goes before what is there: another vLLM, under test-compat
    log: Path


def run_scripts(scripts: list[Script]) -> None:
    """Run all of them at once, one for each core of a small machine; fail with the log of one that fails."""
    running = []
    try:
        for script in scripts:
            folders = [script.environment.get("PYTHONPATH"), os.environ.get("PYTHONPATH")]
            environment = os.environ | script.environment | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
            with script.log.open("w") as log:
                command = [sys.executable, *script.command]
                running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        for script, process in zip(scripts, running, strict=True):
            if process.wait(timeout=900) != 0:
                end = script.log.read_text()[-8000:]
                raise RuntimeError(f"{script.command[0]} ended with {process.returncode}:\n{end}")
    finally:
        for process in running:
            process.kill()


@dataclass
class Recorded:
    """The drafter's inputs and outputs while an engine ran."""

    fused: list[tuple[torch.Tensor, torch.Tensor]]  # hidden states [B, D] and target ids [B] of get_top_tokens
    dense: int  # calls of compute_logits


def record(model) -> Recorded:
    """Record the inputs and outputs of a live draft model without changing its drafts."""
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
    """Return the draft model inside an engine of this process."""
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    return runner.drafter.model


def generate(llm, prompts, tokens=TOKENS, **sampling):
    """Return greedy token ids for each prompt, with all prompts in one batch."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, **sampling)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in outputs]
