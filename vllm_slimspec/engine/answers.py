"""The answers of a target, with or without a drafter, from a vLLM engine in a separate process.

An engine does not release all of its memory when it ends, so each engine runs in its own process and writes its answers
to a file. A file that answers the same question is read instead, so that a run that was killed can continue.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from vllm_slimspec.common.cores import every_core
from vllm_slimspec.common.output import write_whole
from vllm_slimspec.common.process import how_it_ended, last_words, run_ticking
from vllm_slimspec.common.progress import counted, progress
from vllm_slimspec.engine.acceptance import Acceptance, from_engine
from vllm_slimspec.engine.offline import CACHE
from vllm_slimspec.errors import EngineError
from vllm_slimspec.target import fingerprint

_TOP = 8  # log-probabilities kept at each place when the target answers without a drafter


class Question(BaseModel):
    """The prompts and settings for one engine."""

    target: str
    drafter: str | None  # None: the target answers without a drafter
    num_speculative_tokens: int
    prompts: list[list[int]]
    temperatures: list[float]
    max_tokens: int
    ignore_eos: bool
    engine: dict[str, Any]  # arguments of vllm.LLM


class Answers(BaseModel):
    """The answers to all prompts at one temperature, in the order of the prompts."""

    tokens: list[list[int]]
    accepted: list[Acceptance] | None  # None without a drafter
    top: list[list[dict[int, float]]] | None  # log-probabilities of the best tokens; None with a drafter

    def part(self, some: slice) -> "Answers":
        """Return the answers to some of the prompts."""
        return Answers(**{name: found and found[some] for name, found in self})


class Found(BaseModel):
    """The answers of one engine, with one entry for each temperature."""

    made_from: str  # SHA-256 of the question and of the fingerprints of the models
    device: str
    dtype: str
    answers: list[Answers]


def ask(question: Question, file: Path) -> Found:
    """Start an engine, ask it the question, and return its answers.

    They are kept in ``file``, and the engine's log is written beside it.

    Raises:
        EngineError: the engine failed.
    """
    models = [fingerprint(model) for model in (question.target, question.drafter) if model is not None]
    made_from = hashlib.sha256("".join([question.model_dump_json(), *models]).encode()).hexdigest()
    if file.is_file() and (found := Found.model_validate_json(file.read_text())).made_from == made_from:
        return found
    file.parent.mkdir(parents=True, exist_ok=True)
    asked, log = file.with_suffix(".question"), file.with_suffix(".log")
    asked.write_text(question.model_dump_json())
    count = len(question.prompts) * len(question.temperatures)
    with progress(f"vLLM, {file.stem}", count, "answer") as shown:
        code = run_ticking([__name__, str(asked), str(file), made_from], log, shown.update)
    asked.unlink()
    if code:
        raise EngineError(f"vLLM {how_it_ended(code)} {last_words(log)}")
    return Found.model_validate_json(file.read_text())


def _run(question: Question, answered: Callable[[int], Any]) -> tuple[Any, list[Answers]]:
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    options: dict[str, Any] = {"enable_prefix_caching": False, "disable_log_stats": False} | question.engine
    # vLLM 0.32 and later count for each request. With older versions, prompts are asked one by one and the engine's
    # counters are read after each.
    by_request = "per_request_spec_decode_metrics" in {field.name for field in fields(EngineArgs)}
    if question.drafter is not None:
        options["speculative_config"] = {
            "method": "eagle3",
            "model": question.drafter,
            "num_speculative_tokens": question.num_speculative_tokens,
        }
        if by_request:
            options["per_request_spec_decode_metrics"] = "summary"
    with every_core():
        llm = LLM(model=question.target, **options)
    return llm, [_ask(llm, question, temperature, by_request, answered) for temperature in question.temperatures]


def _ask(llm: Any, question: Question, temperature: float, by_request: bool, answered: Callable[[int], Any]) -> Answers:
    from vllm import SamplingParams

    def generate(places: Sequence[int]) -> list[Any]:
        params = [
            SamplingParams(
                temperature=temperature,
                seed=place if temperature else None,
                max_tokens=question.max_tokens,
                ignore_eos=question.ignore_eos,
                detokenize=False,
                logprobs=_TOP if question.drafter is None and not temperature else None,
            )
            for place in places
        ]
        prompts = [{"prompt_token_ids": question.prompts[place]} for place in places]
        return [request.outputs[0] for request in llm.generate(prompts, params, use_tqdm=counted(answered))]

    everything, alone = range(len(question.prompts)), question.drafter is None
    top: list[list[dict[int, float]]] | None = None
    accepted: list[Acceptance] | None = None
    if alone or by_request:
        outputs = generate(everything)
        accepted = None if alone else [_of_histogram(output.spec_decode_metrics.histogram) for output in outputs]
    else:
        outputs, accepted, before = [], [], from_engine(llm)
        for place in everything:
            outputs += generate([place])
            after = from_engine(llm)
            accepted.append(after - before)
            before = after
    if alone and not temperature:
        top = [[{t: entry.logprob for t, entry in place.items()} for place in o.logprobs] for o in outputs]
    return Answers(tokens=[list(output.token_ids) for output in outputs], accepted=accepted, top=top)


def _of_histogram(cycles: Sequence[int]) -> Acceptance:
    """Return the counters for the numbers of cycles in which 0, 1, ... K drafts were accepted."""
    at_least = [sum(cycles[j:]) for j in range(1, len(cycles))]
    return Acceptance(sum(cycles), sum(at_least), tuple(at_least))


def main() -> None:
    """Run one engine in this process.

    The arguments are QUESTION FOUND MADE_FROM DESCRIPTOR. One byte per answer is written to the file descriptor.
    """
    asked, file, made_from, ticks = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    # On a CPU, vLLM would take most of the machine's memory for its cache, and run the model in another process.
    for name, value in (CACHE | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}).items():
        os.environ.setdefault(name, value)
    import torch

    from vllm_slimspec.common.device import device_name

    device = device_name(torch.accelerator.current_accelerator() or torch.device("cpu"))  # before vLLM sets threads
    llm, answers = _run(Question.model_validate_json(asked.read_text()), lambda count: os.write(ticks, b"." * count))
    dtype = str(llm.llm_engine.model_config.dtype).removeprefix("torch.")
    found = Found(made_from=made_from, device=device, dtype=dtype, answers=answers)
    write_whole(file, lambda part: part.write_text(found.model_dump_json()))


if __name__ == "__main__":
    main()
