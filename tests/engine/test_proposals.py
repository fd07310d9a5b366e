"""The tokens that vLLM's proposer returns are the draft head's own choice, request by request, position by position.

Answers are the target's whatever is drafted, so that they cannot show a wrong draft; and a head that chooses right is
not enough, since what it returns goes through vLLM's kernels. Five requests at once, which end one by one, on both
model runners; V2 by Triton's interpreter (see v2/).
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import drafters
import pytest
import torch
from engines import V1_ENVIRONMENT, V2_ENVIRONMENT, Script, run_scripts
from safetensors.torch import load_file

from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.head import ops
from vllm_slimspec.head.spec import DENSE, DOWN, IDS, SCALE, UP

HERE = Path(__file__).parent
REQUESTS, K = 5, 3
RUNNERS = {"v1": "vllm.v1.worker.cpu_model_runner", "v2": "vllm.v1.worker.cpu.model_runner"}

# With a GPU, vLLM serves on that, where no stub is needed or wanted.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the stub backend stands in for a GPU")


@dataclass(frozen=True)
class Form:
    """A form of the draft head, and the path by which vLLM asks it."""

    vocabulary: str = "full"
    kind: str | None = None  # of quantization
    rerank: int | None = None
    rows: str = "own"
    frequent: int | None = None  # tokens with exact rows
    runners: tuple[str, ...] = ("v1", "v2")
    ranks: int = 1
    dtype: str = "float32"
    options: dict | None = None  # of run_proposals.serve

    def write(self, folder, pair):
        """Write the drafter of this form: the trained one of that vocabulary with another head."""
        trained = DraftCheckpoint.open(pair.drafter)
        tensors = {name: trained.load(name) for name in trained.tensors}
        changes = {}
        if self.rerank is not None:
            changes["lm_head_rerank"] = self.rerank
        if self.rows == "target":
            changes["lm_head_rerank_rows"] = "target"
        elif self.rerank is not None:
            rows = _target_head(pair)[_target_ids(tensors)]
            tensors[DENSE] = rows + 0.3 * rows.std() * torch.randn(rows.shape)
        if self.frequent is not None:
            tensors = drafters.tiered(tensors, self.frequent)
            changes["lm_head_frequent"] = self.frequent
        if self.kind is not None:
            up = ops.quantize_up(tensors[UP], self.kind)
            tensors |= {UP: up.weight, SCALE: up.scale}
            changes["lm_head_quantization"] = self.kind
        return drafters.write(folder, trained.config | changes, tensors)


LOGITS = {"speculative": {"use_local_argmax_reduction": False}}
TRITON = {"impl": "triton", "tokens": 4}  # its interpreter is slow, and has no right bfloat16
FORMS = {
    "plain": Form(),
    "int8": Form(kind="int8"),
    "int4": Form(kind="int4"),
    "fp8": Form(kind="fp8"),
    "re-ranked by own rows": Form(rerank=16),
    "re-ranked by the target's rows": Form(rerank=16, rows="target"),
    "logits": Form(options=LOGITS),
    "truncated": Form("truncated"),
    "truncated int4, re-ranked by own rows": Form("truncated", "int4", rerank=16),
    "truncated fp8, re-ranked by the target's rows": Form("truncated", "fp8", rerank=16, rows="target"),
    "truncated logits": Form("truncated", options=LOGITS),
    "int8 in bfloat16": Form(kind="int8", runners=("v1",), dtype="bfloat16"),
    "truncated int4 in bfloat16": Form("truncated", "int4", runners=("v1",), dtype="bfloat16"),
    "Triton": Form(runners=("v2",), options=TRITON),
    "Triton, re-ranked by own rows": Form(rerank=4, runners=("v2",), options=TRITON),
    "two ranks, re-ranked by the target's rows": Form(rerank=16, rows="target", ranks=2),
    "two ranks, truncated int8, re-ranked by own rows": Form("truncated", "int8", rerank=16, ranks=2),
    "tiered": Form(frequent=101),
    "truncated tiered int8, re-ranked by the target's rows": Form("truncated", "int8", 16, "target", 101),
    "tiered logits": Form(frequent=101, runners=("v1",), options=LOGITS),
    "two ranks, tiered": Form(frequent=101, ranks=2),
    "two ranks, truncated tiered int4, re-ranked by own rows": Form("truncated", "int4", 16, frequent=101, ranks=2),
    "spoiled": Form(rerank=16, runners=("v2",), options={"spoil": True}),
}


@pytest.fixture(scope="module")
def served(pair, tmp_path_factory):
    """(runner, form) -> run_proposals.serve of it, and the drafter's folder; a process serves all forms of a runner."""
    folder = tmp_path_factory.mktemp("proposals")
    torch.manual_seed(0)
    written = {name: form.write(folder / name, pair("llama", form.vocabulary)) for name, form in FORMS.items()}

    @functools.cache
    def run(ranks):
        scripts = []
        for runner, environment in (("v1", V1_ENVIRONMENT), ("v2", V2_ENVIRONMENT)):
            out = folder / f"{runner} {ranks}"
            out.mkdir()
            job = {
                name: {
                    "target": str(pair("llama", form.vocabulary).target),
                    "drafter": str(written[name]),
                    "prompts": pair("llama", form.vocabulary).prompts[:REQUESTS],
                    "tokens": 16,
                    "tensor_parallel_size": ranks,
                    "dtype": form.dtype,
                }
                | (form.options or {})
                for name, form in FORMS.items()
                if runner in form.runners and ranks == form.ranks
            }
            (out / "job.json").write_text(json.dumps(job))
            bound = {"VLLM_CPU_OMP_THREADS_BIND": "nobind" if ranks == 1 else "0|1"}  # two ranks: a core for each
            command = [HERE / "run_proposals.py", out / "job.json", out]
            scripts.append(Script(command, environment | bound, out / "log"))
        if ranks == 1:
            run_scripts(scripts)  # both runners at once, each on a core
        else:
            for script in scripts:
                run_scripts([script])

    def result(runner, name):
        ranks = FORMS[name].ranks
        run(ranks)
        return torch.load(folder / f"{runner} {ranks}" / f"{name}.pt"), written[name]

    return result


def _target_head(pair):
    return load_file(pair.target / "model.safetensors")["lm_head.weight"]


def _target_ids(tensors):
    """Return the target id of each draft id."""
    return torch.arange(len(tensors[UP]) + len(tensors.get(IDS, ()))) + tensors.get("d2t", 0)


def scores(form, drafter, target_head, hidden):
    """Score each target id by the drafter's files, -inf for no candidate: hidden [B, K, D] -> float32 [B, K, V]."""
    tensors = load_file(drafter / "model.safetensors")
    up = ops.QuantizedUp(tensors[UP], tensors[SCALE]).dequantize() if form.kind else tensors[UP]
    ids, hidden = _target_ids(tensors), hidden.float()

    def rescore(found):
        if form.rerank is None:
            return found
        tail = drafters.tail_ids(tensors) if form.frequent else slice(None)
        exact = hidden @ tensors.get(DENSE, target_head[ids[tail]]).T
        return drafters.rescored(found, exact, form.rerank, form.ranks)

    if form.frequent:
        found = drafters.tiered_scores(tensors, hidden, up, rescore)
    else:
        found = rescore(hidden @ tensors[DOWN].T @ up.T)
    return found.new_full((*found.shape[:2], len(target_head)), -torch.inf).index_copy(2, ids, found)


def wrong(calls):
    """Return how many proposed tokens are not those that the head chose, and how many there are in all."""
    of_all = [call["proposed"] != call["chosen"] for call in calls]
    return sum(int(differs.sum()) for differs in of_all), sum(differs.numel() for differs in of_all)


CASES = [
    pytest.param(runner, name, id=f"{name}, {runner}", marks=[pytest.mark.broad] if form.ranks > 1 else [])
    for name, form in FORMS.items()
    for runner in form.runners
    if name != "spoiled"
]


@pytest.mark.parametrize(("runner", "name"), CASES)
def test_proposed_tokens_are_the_heads_choice(served, pair, runner, name):
    """Catches: drafted ids that reach the scheduler or the next draft step as other ids, or in another request's
    place."""
    form = FORMS[name]
    ranks, drafter = served(runner, name)
    target_head = _target_head(pair("llama", form.vocabulary))
    assert len(ranks) == form.ranks
    for rank in ranks:
        calls = rank["calls"]
        assert rank["runner"].startswith(RUNNERS[runner])
        assert max(len(call["proposed"]) for call in calls) == REQUESTS
        assert {path for call in calls for path in call["paths"]} == {"dense" if "logits" in name else "fused"}
        mistakes, proposed = wrong(calls)
        assert mistakes == 0, f"{mistakes} of {proposed} proposed tokens are not what the head chose"
        for call in calls:
            assert call["proposed"].shape[1] == K
            expected = scores(form, drafter, target_head, call["hidden"])
            chosen = expected.gather(2, call["proposed"][:, :, None])[:, :, 0]
            allowed = expected.abs().masked_fill(expected == -torch.inf, 0).amax(dim=2)
            assert (expected.amax(dim=2) - chosen <= allowed * (1e-5 if form.dtype == "float32" else 0.02)).all()


def test_strided_view_as_proposal_is_noticed(served):
    """Catches: a test of proposals that would notice nothing, because all requests draft the same tokens, or a Model
    Runner V2 that no longer needs contiguous ids."""
    mistakes, proposed = wrong(served("v2", "spoiled")[0][0]["calls"])
    assert mistakes > proposed / 4
