"""``slimspec bench acceptance`` and ``bench serve`` on a trained pair: what they count is what was served."""

import json

import pytest
from engines import generate

from vllm_slimspec.drafters.checkpoint import DraftCheckpoint, write_checkpoint
from vllm_slimspec.engine.acceptance import from_engine
from vllm_slimspec.measure import compare, serve

pytestmark = pytest.mark.broad

K, TOKENS = 3, 24
PROMPTS = 6


@pytest.fixture(scope="module")
def prompts(pair, tmp_path_factory):
    """Two sets of prompts of the pair's language, as text."""
    folder = tmp_path_factory.mktemp("prompts")
    texts = [" ".join(f"t{token}" for token in ids) for ids in pair("llama").prompts[: 2 * PROMPTS]]
    for name, part in (("first", texts[:PROMPTS]), ("second", texts[PROMPTS:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in part))
    return [folder / "first.jsonl", folder / "second.jsonl"]


@pytest.fixture(scope="module")
def spoiled(pair, tmp_path_factory):
    """The drafter with its head negated: it drafts the tokens that it finds least likely."""
    checkpoint = DraftCheckpoint.open(pair("llama").drafter)
    tensors = {name: checkpoint.load(name) for name in checkpoint.tensors}
    tensors["lm_head.up.weight"] = -tensors["lm_head.up.weight"]
    folder = tmp_path_factory.mktemp("spoiled") / "drafter"
    return write_checkpoint(folder, checkpoint.config, tensors, {"command": "test"}).path


def test_acceptance_counts_are_those_of_the_engine(pair, prompts, spoiled, engine, tmp_path):
    """Catches: cycles of one prompt set counted for the other, a drafter that is not the named one, or an answer judged
    wrongly."""
    p = pair("llama")
    options = compare.Options(
        target=str(p.target),
        drafters={"trained": str(p.drafter), "spoiled": str(spoiled)},
        prompts=prompts,
        k=K,
        max_tokens=TOKENS,
        ignore_eos=True,
        engine={"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "max_num_seqs": 8},
        work=tmp_path,
    )
    results = compare.measure(options)
    rows = {(row.head, row.prompt_set): row for row in results.rows}
    assert list(rows) == [(head, name) for head in ("trained", "spoiled") for name in ("first", "second")]
    assert all(row.equal == PROMPTS and row.tokens == PROMPTS * TOKENS for row in results.rows)
    assert results.vocab_size == 512
    first, second = rows["trained", "first"], rows["trained", "second"]
    assert (first.rank, first.draft_vocab_size, first.dense_bytes) == (16, 512, 512 * 64 * 4)

    llm = engine(p.target, p.drafter, K)
    generate(llm, p.prompts[:PROMPTS], TOKENS)
    counted = from_engine(llm)
    assert (sum(first.cycles), sum(first.accepted)) == (counted.drafts, counted.accepted)
    assert first.per_position == pytest.approx(counted.per_position)
    generate(llm, p.prompts[PROMPTS : 2 * PROMPTS], TOKENS)
    counted = from_engine(llm) - counted
    assert (sum(second.cycles), sum(second.accepted)) == (counted.drafts, counted.accepted)

    assert first.low <= first.length <= first.high
    assert first.length > 1.5 > rows["spoiled", "first"].length


def test_bench_serve_starts_a_server_for_each_drafter(pair, prompts):
    """Catches: a load generator whose flags or results have changed, a drafter that is not served, or warm-up requests
    counted."""
    p = pair("llama")
    server = ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
    served = serve.Pair(str(p.target), {"trained": str(p.drafter)}, prompts[0], server)
    options = serve.Options(pair=served, k=K, concurrencies=[1, 2], requests=2, max_tokens=TOKENS)
    first_server, results = serve.measure(options)
    assert first_server.rows == results.rows[:2]
    assert [(row.head, row.concurrency) for row in results.rows] == [
        (head, n) for head in ("none", "trained") for n in (1, 2)
    ]
    for row in results.rows:
        assert (row.completed, row.failed) == (2 * row.concurrency, 0)
        assert row.output_tokens == TOKENS * row.completed
        assert 0 < row.tpot_ms_p50 < row.ttft_ms_p80 * TOKENS
    assert [row.length is None for row in results.rows] == [True, True, False, False]
    assert all(row.length > 1.5 for row in results.rows if row.length is not None)
    assert (results.prompt_set, results.vocab_size) == ("first", 512)
