"""A SlimSpec drafter on Model Runner V2, with our Triton kernel inside: outputs and distributions are the target's.

All on a CPU, through Triton's interpreter; see run_v2.py. What random numbers decide is seeded.
"""

import json
from collections import Counter
from pathlib import Path

import drafters
import pytest
import torch
from engines import V2_ENVIRONMENT, Script, run_scripts
from scipy.stats import chi2_contingency
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_slimspec.head.spec import DOWN, UP

VOCAB = 64
HERE = Path(__file__).parent
RATES = [0.8, 0.4]  # synthetic acceptance

# With a GPU, vLLM serves on that, where no stub is needed or wanted.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the stub backend stands in for a GPU")


@pytest.fixture(scope="session")
def answers(pair, tmp_path_factory):
    """What every call of two jobs returned, by name; each job is a process, for one core of a small machine."""
    folder = tmp_path_factory.mktemp("v2")
    target, full, truncated = write_sampling_models(folder)
    jobs = [
        greedy("full", pair("llama", "full"))
        | greedy("truncated", pair("llama", "truncated"))
        | {"samplers": {"call": "samplers"}},
        {
            "target": serve(target, arm(0)),
            "greedy drafts": serve(target, arm(10_000), drafter=full, num_speculative_tokens=2, impl="triton"),
            "probabilistic drafts": serve(
                target,
                arm(20_000),
                arm(30_000) | {"lie": True},
                drafter=truncated,
                num_speculative_tokens=2,
                draft_sample_method="probabilistic",
            ),
            "synthetic": serve(
                target,
                arm(40_000, requests=200, tokens=16),
                drafter=full,
                num_speculative_tokens=2,
                rejection_sample_method="synthetic",
                synthetic_acceptance_rates=RATES,
            ),
        },
    ]
    scripts = []
    for i, job in enumerate(jobs):
        (folder / f"job{i}.json").write_text(json.dumps(job, default=str))
        command = [HERE / "run_v2.py", folder / f"job{i}.json", folder / f"result{i}.json"]
        scripts.append(Script(command, V2_ENVIRONMENT, folder / f"log{i}"))
    run_scripts(scripts)
    return {k: v for i in range(len(jobs)) for k, v in json.loads((folder / f"result{i}.json").read_text()).items()}


def serve(target, *batches, **options):
    """Return the job entry for a call of run_v2.serve."""
    return {"call": "serve", "target": target, "batches": batches, **options}


def greedy(name, pair):
    """Greedy answers of the target alone and with its drafter: one prompt, then eight of different lengths."""
    batches = [{"prompts": pair.prompts[:n], "tokens": 32} for n in (1, 8)]
    return {
        f"{name} alone": serve(pair.target, *batches),
        name: serve(pair.target, *batches, drafter=pair.drafter, num_speculative_tokens=3, impl="triton"),
    }


def arm(seed, requests=2000, tokens=3):
    """One prompt many times at temperature 1, each time with its own seed."""
    return {"prompts": [[3, 4, 5, 6]] * requests, "tokens": tokens, "temperature": 1.0, "seed": seed}


def write_sampling_models(folder):
    """A random target of 64 tokens, some of them likely anywhere, and two drafters that roughly know which.

    The first hidden dimension is a constant, which the head turns into a bias for each token. A drafter has the
    target's head, in a lower rank, over the target's hidden state of one token before.

    Returns:
        folders: the target, a drafter of all tokens, a drafter of 48.
    """
    torch.manual_seed(0)
    config = drafters.config(vocab_size=VOCAB, num_hidden_layers=3, lm_head_rank=None, draft_vocab_size=None)
    target = LlamaForCausalLM(LlamaConfig(**config))
    head = torch.randn(VOCAB, drafters.D) * 0.12
    head[:, 0] = torch.randn(VOCAB) * 0.55
    with torch.no_grad():
        target.lm_head.weight.copy_(head)
        target.model.embed_tokens.weight.normal_()[:, 0] = 8
    target.save_pretrained(folder / "target")

    rank = 32
    for name, kept in (("full", torch.arange(VOCAB)), ("truncated", torch.randperm(VOCAB)[:48].sort().values)):
        left, values, right = torch.linalg.svd(head[kept], full_matrices=False)
        tensors = drafters.tensors(rank=rank)
        tensors["fc.weight"] = torch.eye(drafters.D, 3 * drafters.D).roll(
            2 * drafters.D, dims=1
        )  # the last of 3 layers
        tensors[DOWN] = right[:rank].contiguous()
        tensors[UP] = (left * values)[:, :rank].contiguous()
        if len(kept) < VOCAB:
            tensors["d2t"] = kept - torch.arange(len(kept))
        config = drafters.config(vocab_size=VOCAB, draft_vocab_size=len(kept), lm_head_rank=rank)
        drafters.write(folder / name, config, tensors)
    return folder / "target", folder / "full", folder / "truncated"


def homogeneity(one, other):
    """Test by chi-square that two arms drew their token triples from one distribution -> p, cells."""
    counts = [Counter(map(tuple, arm["tokens"])) for arm in (one, other)]
    pooled = counts[0] + counts[1]
    cells = [triple for triple in pooled if pooled[triple] >= 10]  # expected: 5 an arm
    table = [[count[triple] for triple in cells] for count in counts]
    for row, count in zip(table, counts, strict=True):
        row.append(count.total() - sum(row))  # all rare triples together
    return chi2_contingency(table, correction=False).pvalue, len(table[0])


def test_engine_runs_model_runner_v2(answers):
    """Catches: an engine that falls back to Model Runner V1, with which the tests below would test nothing new."""
    engines = {name: answer for name, answer in answers.items() if name != "samplers"}
    assert {engine["runner"] for engine in engines.values()} == {"vllm.v1.worker.cpu.model_runner"}


@pytest.mark.parametrize("batch", [0, 1], ids=["one prompt", "eight prompts"])
@pytest.mark.parametrize("name", ["full", "truncated"])
def test_greedy_output_is_the_targets(answers, name, batch):
    """Catches: a drafter that changes the answers that users get, or answers that are equal only because no draft was
    accepted or none was rejected."""
    alone, drafted = (answers[arm]["batches"][batch] for arm in (f"{name} alone", name))
    assert drafted["tokens"] == alone["tokens"]
    assert 0.2 < drafted["accepted"][0] < 1


@pytest.mark.parametrize("name", ["full", "truncated"])
def test_triton_kernel_drafts_the_heads_argmax(answers, name):
    """Catches: torch or full logits used where the Triton kernel should draft, padding that wins, or d2t left out or
    applied twice."""
    drafted = answers[name]
    assert drafted["launched"] >= drafted["fused"] > 50
    assert drafted["dense"] == 0
    assert drafted["wrong"] == 0


def test_sampling_with_greedy_drafts_is_lossless(answers):
    """Catches: drafted ids that are not those that the rejection sampler takes them for, at temperature 1."""
    drafted = answers["greedy drafts"]
    p, cells = homogeneity(answers["target"]["batches"][0], drafted["batches"][0])
    assert p > 1e-3
    assert cells > 30
    assert 0.15 < drafted["batches"][0]["accepted"][0] < 0.9
    assert drafted["launched"] >= drafted["fused"] > 0
    assert drafted["dense"] == drafted["wrong"] == 0


def test_sampling_with_probabilistic_drafts_is_lossless(answers):
    """Catches: drafts sampled from anything but the logits that the rejection sampler is given, d2t included."""
    drafted = answers["probabilistic drafts"]
    p, _ = homogeneity(answers["target"]["batches"][0], drafted["batches"][0])
    assert p > 1e-3
    assert 0.15 < drafted["batches"][0]["accepted"][0] < 0.9
    assert drafted["dense"] > 0
    assert drafted["fused"] == 0


def test_sampling_test_notices_a_wrong_proposal_distribution(answers):
    """Catches: a statistical test too weak to notice drafts from a wrong distribution."""
    p, _ = homogeneity(answers["target"]["batches"][0], answers["probabilistic drafts"]["batches"][1])
    assert p < 1e-3


def test_drafter_runs_with_synthetic_acceptance(answers):
    """Catches: a drafter that cannot run under vLLM's synthetic acceptance, by which benchmarks fix how often drafts
    are accepted."""
    batch = answers["synthetic"]["batches"][0]
    assert batch["accepted"] == pytest.approx(RATES, abs=0.05)
    assert {token for tokens in batch["tokens"] for token in tokens} <= set(range(VOCAB))


def test_grouped_interpreter_draws_the_tokens_of_tritons_own(answers):
    """Catches: the test's own, faster interpreter drawing other tokens than Triton's interpreter would."""
    grouped, one_by_one = answers["samplers"]
    assert grouped == one_by_one
