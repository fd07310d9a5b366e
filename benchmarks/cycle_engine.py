"""An engine of ``benchmarks/cycle.py``, which runs cycles in a process of its own and reports how long each took.

A cycle is K draft steps and their verification, and is one step of the engine. With random weights next to nothing is
accepted, so that a cycle gives one token per request.
"""

import itertools
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from random_pairs import DTYPE
from vllm_slimspec.common.process import how_it_ended, last_words, run_ticking
from vllm_slimspec.errors import EngineError

SPAWN = "VLLM_WORKER_MULTIPROC_METHOD"
_HERE = str(Path(__file__).resolve().parent)


class Plan(BaseModel):
    """The work of one engine."""

    target: str
    drafter: str
    heads: list[str]  # on a CPU the heads that take turns in this engine; on a GPU the drafter's own head
    rank: int
    num_speculative_tokens: int
    batches: list[int]
    contexts: list[int]
    rounds: int
    cycles: int  # timed cycles at each turn of a head
    repeats: int  # timed calls of each head alone
    device: str
    speculative: dict[str, Any]  # further keys of vLLM's speculative_config
    dtype: str = DTYPE  # of both models
    load_format: str = "dummy"  # how vLLM gets the target's weights: "dummy" are random, "auto" are read from files
    seed: int = 0  # seed of the engine, from which vLLM draws imitated acceptance

    @property
    def exchange(self) -> bool:
        """Whether heads take turns in this engine."""
        return self.device == "cpu"

    @property
    def untimed(self) -> int:
        """The number of untimed cycles that begin a turn. A GPU needs some until host and device are in step."""
        return 1 if self.exchange else 5

    @property
    def ticks(self) -> int:
        """The number of turns that the engine will report."""
        return len(self.batches) * len(self.contexts) * (self.rounds + self.exchange) * len(self.heads)

    @property
    def max_model_len(self) -> int:
        """The length that a round needs if every draft token is accepted, in tokens."""
        cycles = len(self.heads) * (self.cycles + self.untimed) + 2 + max(self.batches)
        return max(self.contexts) + (self.num_speculative_tokens + 1) * cycles


class Turn(BaseModel):
    """The cycles of one head in one round."""

    head: str
    batch: int
    context: int
    ms: list[float]  # time of each cycle
    tokens: int  # tokens that all of the cycles gave
    parts: list[dict[str, float]] | None  # ms of each part of each cycle; None in a round without clocks


class Alone(BaseModel):
    """The calls of a head alone."""

    head: str
    batch: int
    us: list[float]  # time of each call


class Found(BaseModel):
    """The measurements of one engine."""

    threads: int
    turns: list[Turn]
    alone: list[Alone]


def find_benchmarks() -> None:
    """Add this folder to the PYTHONPATH of all processes that this one starts.

    The engine, its workers, and the process in which vLLM inspects the class of the rivals import modules from it.
    """
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if _HERE not in path:
        os.environ["PYTHONPATH"] = os.pathsep.join([_HERE, *filter(None, path)])


def run(plan: Plan, log: Path, tick: Callable[[], None] = lambda: None) -> Found:
    """Run ``plan`` in an engine in a process of its own, and return its measurements; ``tick`` is called every turn.

    Raises:
        EngineError: the engine failed; the message names ``log``, which has all of its output.
    """
    find_benchmarks()
    log.parent.mkdir(parents=True, exist_ok=True)
    asked, found = log.with_suffix(".plan.json"), log.with_suffix(".found.json")
    asked.write_text(plan.model_dump_json())
    found.unlink(missing_ok=True)
    code = run_ticking([__name__, str(asked), str(found)], log, tick)
    if code:
        raise EngineError(f"vLLM {how_it_ended(code)} {last_words(log)}")
    return Found.model_validate_json(found.read_text())


class Engine:
    """A vLLM engine that runs the cycles of a plan one by one."""

    def __init__(self, plan: Plan) -> None:
        # The worker imports this module too. Importing it here registers the rivals' architecture in this process,
        # which reads the drafter's config.
        from vllm import LLM, SamplingParams
        from vllm.sampling_params import RequestOutputKind

        import cycle_worker

        find_benchmarks()

        self.plan = plan
        self.llm = LLM(
            model=plan.target,
            load_format=plan.load_format,
            speculative_config={
                "method": "eagle3",
                "model": plan.drafter,
                "num_speculative_tokens": plan.num_speculative_tokens,
                "draft_load_config": {"load_format": "safetensors"},
                **plan.speculative,
            },
            dtype=plan.dtype,
            max_model_len=plan.max_model_len,
            max_num_seqs=max(plan.batches),
            enforce_eager=plan.exchange,
            skip_tokenizer_init=True,
            enable_prefix_caching=True,  # saves the prefill of the prompts, which are the same in every round
            seed=plan.seed,
            worker_extension_cls=f"{cycle_worker.__name__}.{cycle_worker.WorkerHeads.__name__}",
        )
        self._params = SamplingParams(
            temperature=0,
            max_tokens=plan.max_model_len,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._numbers = itertools.count()
        self._vocab_size = self.llm.llm_engine.model_config.get_vocab_size()

    def ask(self, method: str, *args: Any) -> Any:
        """Call a method of :class:`cycle_worker.WorkerHeads`, and return its result."""
        return self.llm.collective_rpc(method, args=args)[0]

    @contextmanager
    def requests(self, batch: int, context: int) -> Iterator[None]:
        """Give a context in which ``batch`` requests with prompts of ``context`` tokens have finished their prefill."""
        engine = self.llm.llm_engine
        waiting = {str(next(self._numbers)): random.Random(i) for i in range(batch)}
        names = list(waiting)
        for name, draw in waiting.items():
            prompt = [draw.randrange(self._vocab_size) for _ in range(context)]
            engine.add_request(name, {"prompt_token_ids": prompt}, self._params)
        while waiting:
            for output in engine.step():
                waiting.pop(output.request_id, None)
        yield
        engine.abort_request(names)
        while engine.has_unfinished_requests():
            engine.step()

    def turn(self, head: str, batch: int, context: int, clocks: bool = False) -> Turn:
        """Run the untimed cycles of a turn, then the timed ones, and return them.

        Args:
            head: the name of the head that the engine uses now.
            batch: the number of running requests.
            context: the number of tokens of their prompts.
            clocks: whether clocks around the parts are on, so that their times are returned too.

        Raises:
            RuntimeError: a cycle was no whole cycle of all requests.
        """
        found = Turn(head=head, batch=batch, context=context, ms=[], tokens=0, parts=[] if clocks else None)
        for i in range(self.plan.untimed + self.plan.cycles):
            start = time.perf_counter()
            outputs = self.llm.llm_engine.step()
            ms = (time.perf_counter() - start) * 1e3
            parts = self.ask("slimspec_parts") if clocks else None
            if i < self.plan.untimed:
                continue
            if len(outputs) != batch:
                raise RuntimeError(f"a cycle of {head} gave tokens to {len(outputs)} requests, not to all {batch}")
            found.ms.append(ms)
            found.tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
            if parts is not None and found.parts is not None:
                if len(parts["head"]) != self.plan.num_speculative_tokens:
                    raise RuntimeError(
                        f"a cycle of {head} called its head {len(parts['head'])} times, not "
                        f"K = {self.plan.num_speculative_tokens} times"
                    )
                found.parts.append({part: sum(times) for part, times in parts.items()})
        return found


def measure(engine: Engine, tick: Callable[[], Any] = lambda: None) -> Found:
    """Run the engine's plan, and return its measurements; ``tick`` is called after every turn."""
    plan = engine.plan
    if plan.exchange:
        engine.ask("slimspec_make", plan.heads, plan.rank, plan.batches)
    else:
        engine.ask("slimspec_own", *plan.heads)
    alone = []
    turns = []

    def go_round(batch: int, context: int, first: int, clocks: bool = False) -> None:
        with engine.requests(batch, context):
            for head in rotated(plan.heads, first):
                if plan.exchange:
                    engine.ask("slimspec_use", head)
                turns.append(engine.turn(head, batch, context, clocks))
                tick()

    for batch in plan.batches:
        times = engine.ask("slimspec_time", batch, plan.repeats)
        alone += [Alone(head=head, batch=batch, us=us) for head, us in times.items()]
    for batch, context in itertools.product(plan.batches, plan.contexts):
        for number in range(plan.rounds):
            go_round(batch, context, number)
    if plan.exchange:
        engine.ask("slimspec_clocks")
        for batch, context in itertools.product(plan.batches, plan.contexts):
            go_round(batch, context, 0, clocks=True)
    return Found(threads=engine.ask("slimspec_threads"), turns=turns, alone=alone)


def rotated(names: Sequence[str], first: int) -> list[str]:
    """Return the names rotated, so that number ``first`` (modulo their count) comes first.

    Each round begins with another head, so that no head always profits from its place.
    """
    first %= len(names)
    return [*names[first:], *names[:first]]


def main() -> None:
    """Run one engine in this process, with the arguments PLAN FOUND DESCRIPTOR.

    PLAN is the JSON file to read, FOUND the one to write, and DESCRIPTOR a file descriptor that gets a byte every turn.
    """
    asked, found, ticks = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    plan = Plan.model_validate_json(asked.read_text())
    if plan.exchange:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # makes one step of the engine exactly one cycle
    else:
        # torch has looked for GPUs in this process already, after which a forked process cannot use them.
        os.environ.setdefault(SPAWN, "spawn")
    result = measure(Engine(plan), lambda: os.write(ticks, b"."))
    found.write_text(result.model_dump_json())


if __name__ == "__main__":
    main()
