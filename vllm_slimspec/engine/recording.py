"""Recording of head states in a real vLLM engine: the target and a drafter run, and the draft head's inputs are kept.

First the target answers each prompt greedily. Then it is asked again K + 1 times, from K + 1 neighboring places of that
answer. This time the draft head's own tokens are replaced by the target's known tokens, so every draft is accepted and
each request moves K + 1 places in a cycle. Together the K + 1 requests start a cycle at every place of the answer, so
that the walk of any head through the documents can be computed exactly.
"""

import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from vllm_slimspec.common.progress import counting, progress
from vllm_slimspec.common.work_dtype import Asked, engine_options
from vllm_slimspec.engine.head_states import Document, HeadStates, Rows, StatesWriter, concatenate, sha256
from vllm_slimspec.engine.offline import generate, offline_engine
from vllm_slimspec.engine.prompts import one_line, open_tokenizer, read_prompts, tokenize
from vllm_slimspec.errors import CheckpointError, OptionError
from vllm_slimspec.target import fingerprint

_DOCUMENTS = 16  # answered together and stored in one file; up to 16 * max_tokens * K states are in memory
_ONE_PROCESS: dict[str, Any] = {
    **dict.fromkeys(("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"), 1),
    "distributed_executor_backend": "uni",
}
_RUN_AGAIN = "what was recorded is kept, so run the command again"


def collect(
    target: str | Path,
    drafter: str | Path,
    prompts: str | Path,
    folder: str | Path,
    *,
    k: int = 5,
    max_tokens: int = 256,
    max_states: int = 100_000,
    engine: dict[str, Any] | None = None,
    dtype: Asked = "auto",
    method: Literal["eagle3", "mtp"] = "eagle3",
    identity: str | None = None,
) -> HeadStates:
    """Record head states while the target answers prompts. A run that was killed continues where it stopped.

    Args:
        target: Hugging Face folder or id.
        drafter: an EAGLE-3 drafter that vLLM serves, with any head, since only the head's *inputs* are kept; the target
            again for an MTP drafter, which is a part of it.
        prompts: a JSONL file, see :mod:`vllm_slimspec.engine.prompts`. The order of the prompts is random but always
            the same, because files are often sorted and ``max_states`` is reached long before their end. Documents
            keep the numbers of the file.
        folder: where the states are written.
        k: the number of draft steps in a cycle, as in service.
        max_tokens: the most tokens of an answer.
        max_states: recording stops after the group of documents that reaches this number of states.
        engine: arguments of ``vllm.LLM``.
        dtype: of both models, see :func:`vllm_slimspec.common.work_dtype.engine_options`.
        method: vLLM's speculative method.
        identity: a text that is the same for all drafters that may continue this recording, such as a hash of their
            body; None: only this drafter may.

    Raises:
        CheckpointError: the prompts cannot be used, the folder holds something else, or nothing could be recorded.
        EngineError: vLLM failed.
        OptionError: ``engine`` asks for several devices or processes.
    """
    options = engine or {}
    check_engine(options)
    file = Path(prompts)
    rows = read_prompts(file)
    settings = {"order": "random", "K": k, "max_tokens": max_tokens, "max_states": max_states}
    settings |= {} if method == "eagle3" else {"method": method}
    writer = StatesWriter(folder, {**_models(target, drafter, identity), "prompts_sha256": sha256(file), **settings})
    if writer.complete:
        return HeadStates.open(folder)
    vocab_size, max_model_len = limits(target, options)
    # An engine that stops after max_tokens has drafted up to k - 1 tokens more.
    length = max_model_len - max_tokens - 2 * k
    documents = tokenize(rows, open_tokenizer(rows, str(options.get("tokenizer", target))), vocab_size, length, file)
    order = random.Random(0).sample([*enumerate(documents)], len(documents))
    with _engine(target, drafter, max(k, 2), engine_options(options, dtype, "head states"), method) as llm:
        watcher = _Watcher(llm, k)
        with progress("Head states", max_states, "state", done=writer.count()) as shown:
            for group, first in enumerate(range(0, len(order), _DOCUMENTS)):
                if not writer.has(group):
                    answered = _answer(llm, order[first : first + _DOCUMENTS], max_tokens + k - 1)
                    writer.write(group, watcher.record(llm, answered), answered)
                recorded = writer.count()
                shown.reach(recorded)
                if recorded >= max_states:
                    break
    if not writer.count():
        raise CheckpointError(
            f"{prompts}: the target answered with fewer than {k} tokens everywhere, so there is no draft to watch; "
            "give other prompts"
        )
    return writer.finish()


def collect_again(
    target: str | Path,
    drafter: str | Path,
    documents: Sequence[Document],
    folder: str | Path,
    *,
    k: int,
    engine: dict[str, Any],
    dtype: Asked,
    identity: str | None = None,
) -> HeadStates:
    """Record the head states of another drafter over documents that the target has answered before.

    Arguments and errors are those of :func:`collect`. The documents, of :meth:`HeadStates.documents`, keep their
    numbers.
    """
    check_engine(engine)
    writer = StatesWriter(folder, {**_models(target, drafter, identity), "K": k})
    if writer.complete:
        return HeadStates.open(folder)
    with (
        _engine(target, drafter, max(k, 2), engine_options(engine, dtype, "head states")) as llm,
        progress("Head states", len(documents), "document") as shown,
    ):
        watcher = _Watcher(llm, k)
        for group, first in enumerate(range(0, len(documents), _DOCUMENTS)):
            part = documents[first : first + _DOCUMENTS]
            if not writer.has(group):
                writer.write(group, watcher.record(llm, part), part)
            shown.update(len(part))
    return writer.finish()


def limits(target: str | Path, options: dict[str, Any]) -> tuple[int, int]:
    """Return the target's vocabulary size and longest sequence in an engine, or raise CheckpointError if it refuses."""
    from vllm import EngineArgs

    try:
        config = EngineArgs(model=str(target), **options).create_model_config()
    except Exception as error:  # pydantic, transformers and vLLM raise classes of their own
        raise CheckpointError(
            f"{target}: vLLM refuses this target ({one_line(error)}); check --target and --engine-args"
        ) from None
    return config.get_vocab_size(), config.max_model_len


def _models(target: str | Path, drafter: str | Path, identity: str | None) -> dict[str, str]:
    """Return the names of both models and their fingerprints, because the model under a name may change."""
    prints = {"target_fingerprint": fingerprint(target), "drafter_fingerprint": identity or fingerprint(drafter)}
    return {"target": str(target), "drafter": str(drafter), **prints}


def check_engine(options: Mapping[str, Any]) -> None:
    """Raise OptionError for an argument of ``vllm.LLM`` with which the draft head runs in another process."""
    for key, one in _ONE_PROCESS.items():
        if options.get(key) not in (None, one):
            raise OptionError(
                f"--engine-args {key}={options[key]!r}: head states are recorded in one process, on one device; leave "
                "it out, or give states that are recorded already (--hidden-states)"
            )


def _engine(
    target: str | Path, drafter: str | Path, k: int, options: dict[str, Any], method: str = "eagle3"
) -> AbstractContextManager[Any]:
    """Run an offline engine in this process, where its draft head can be watched."""
    # Model Runner V1 calls the head from Python at every step. V2 replays the head from CUDA graphs.
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    speculative: dict[str, Any] = {"method": method, "num_speculative_tokens": k}
    if method != "mtp":  # vLLM reads an MTP drafter from the target.
        speculative["model"] = str(drafter)
    ours = {"speculative_config": speculative, "enforce_eager": True, "async_scheduling": False}
    return offline_engine(target, options | ours, environment=environment, cure=_RUN_AGAIN)


def _answer(llm: Any, prompts: Sequence[tuple[int, list[int]]], max_tokens: int) -> list[Document]:
    outputs = _generate(llm, [ids for _, ids in prompts], [max_tokens] * len(prompts), ignore_eos=False)
    return [Document(number, [*ids, *out], len(ids)) for (number, ids), out in zip(prompts, outputs, strict=True)]


def _generate(llm: Any, prompts: Sequence[list[int]], lengths: Sequence[int], ignore_eos: bool) -> list[list[int]]:
    from vllm import SamplingParams

    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=ignore_eos, detokenize=False) for n in lengths]
    outputs = generate(llm, prompts, params, counting(f"of {len(prompts)} requests"), _RUN_AGAIN)
    return [list(output.token_ids) for output in outputs]


@dataclass
class _Request:
    """One walk of cycles through an answer. The place of a cycle is the index of the first token that it drafts."""

    tokens: list[int]
    start: int  # the number of tokens in the prompt
    next: int  # the place of the next cycle, if all drafts are accepted
    cycles: dict[int, torch.Tensor] = field(default_factory=dict)  # place -> states [K, D]


class _Watcher:
    """A wrapper around a running draft head. It keeps the head's inputs and returns the target's tokens as drafts."""

    def __init__(self, llm: Any, k: int) -> None:
        self._runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        self._k = k
        self._walks: dict[tuple[int, ...], _Request] = {}  # by prompt, because the engine chooses the request ids
        self._batch: list[_Request] = []
        self._states: list[torch.Tensor] = []
        self._places: list[int] = []
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        model = self._runner.drafter.model
        self._wrap(self._runner.drafter, "propose", self._begin)
        if self._runner.drafter.method == "mtp":
            # An MTP drafter normalizes its hidden states on their way to the head, so the last step is watched.
            for processor in (module for module in model.modules() if isinstance(module, LogitsProcessor)):
                self._wrap(processor, "forward", self._processed)
        else:
            self._wrap(model, "get_top_tokens", self._top_tokens)
            self._wrap(model, "compute_logits", self._logits)
        model.register_forward_pre_hook(self._look_at_positions, with_kwargs=True)

    def record(self, llm: Any, answered: Sequence[Document]) -> Rows:
        """Ask for each answer again from K + 1 places, and return the states of all cycles, document by document."""
        walks: list[list[_Request]] = []
        for document in answered:
            starts = range(document.prompt, min(document.prompt + self._k + 1, len(document.tokens) - self._k))
            walks.append([_Request(document.tokens, start, start + 1) for start in starts])
        flat = [walk for group in walks for walk in group]
        prompts = [walk.tokens[: walk.start] for walk in flat]
        self._walks = {tuple(prompt): walk for prompt, walk in zip(prompts, flat, strict=True)}
        lengths = [len(walk.tokens) - walk.start for walk in flat]
        outputs = _generate(llm, prompts, lengths, ignore_eos=True) if prompts else []
        self._walks = {}
        for walk, out in zip(flat, outputs, strict=True):
            _forget_after_divergence(walk, out)
        # Without it the states of a group without any cycle would have no dtype.
        none = torch.zeros(0, self._runner.drafter.hidden_size, dtype=self._runner.model_config.dtype)
        pairs = zip(walks, answered, strict=True)
        return concatenate([_rows(group, document, self._k, none) for group, document in pairs])

    @staticmethod
    def _wrap(owner: Any, name: str, replacement: Any) -> None:
        original = getattr(owner, name, None)
        if original is not None:
            setattr(owner, name, lambda *args, **kwargs: replacement(original, *args, **kwargs))

    def _begin(self, propose: Any, *args: Any, **kwargs: Any) -> Any:
        self._states, self._places, self._batch = [], [], []
        if self._walks:
            ids = self._runner.input_batch.req_ids
            self._batch = [self._walks[tuple(self._runner.requests[i].prompt_token_ids)] for i in ids]
        return propose(*args, **kwargs)

    def _look_at_positions(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Read the place of each cycle from the positions of draft step 1."""
        # Chunked prefill, preemption and rejected drafts move a cycle from its expected place.
        if len(self._states) == 1:
            positions = kwargs["positions"]
            # M-RoPE has several rows of positions, which are equal for text.
            places = positions[0] if positions.ndim == 2 else positions
            self._places = (places[: len(self._batch)] + 1).tolist()

    def _top_tokens(self, original: Any, hidden: torch.Tensor) -> torch.Tensor:
        return self._next_tokens(hidden) if self._batch else original(hidden)

    def _logits(self, original: Any, hidden: torch.Tensor) -> torch.Tensor:
        if not self._batch:
            return original(hidden)
        logits = hidden.new_zeros(len(hidden), self._runner.model_config.get_vocab_size())
        return logits.scatter_(1, self._next_tokens(hidden)[:, None], 1.0)

    def _processed(self, original: Any, head: torch.nn.Module, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._logits(lambda hidden: original(head, hidden, *args, **kwargs), hidden)

    def _next_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        step = len(self._states)
        self._states.append(hidden.clone())
        # Beyond the end of an answer, its last token is as good as any.
        tokens = [walk.tokens[min(walk.next + step, len(walk.tokens) - 1)] for walk in self._batch]
        if len(self._states) == max(self._k, 2):
            self._end()
        return torch.tensor(tokens, device=hidden.device)

    def _end(self) -> None:
        states = torch.stack(self._states[: self._k], dim=1).cpu()  # [B, K, D]
        for walk, place, state in zip(self._batch, self._places, states, strict=True):
            if place != walk.next:
                walk.next = max(walk.start, place) + 1
                continue
            if place + self._k <= len(walk.tokens):
                walk.cycles[place] = state
            walk.next = place + self._k + 1


def _forget_after_divergence(walk: _Request, answer: Sequence[int]) -> None:
    """Drop the cycles after the first token that differs between the two answers of the target."""
    # Near ties are decided differently in another batch, because the target computes in half precision.
    pairs = enumerate(zip(walk.tokens[walk.start :], answer, strict=False), walk.start)
    differing = next((place for place, (a, b) in pairs if a != b), None)
    if differing is not None:
        walk.cycles = {place: state for place, state in walk.cycles.items() if place <= differing}


def _rows(walks: Sequence[_Request], document: Document, k: int, none: torch.Tensor) -> Rows:
    cycles = sorted((place, state) for walk in walks for place, state in walk.cycles.items())
    step = torch.arange(k).repeat(len(cycles))
    pos = torch.tensor([place for place, _ in cycles], dtype=torch.long).repeat_interleave(k) + step
    states = torch.cat([none, *(state for _, state in cycles)])
    return Rows(states, torch.full_like(pos, document.number), step, pos, torch.tensor(document.tokens)[pos])
