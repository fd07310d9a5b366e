"""`vllm serve` over two tensor-parallel ranks, asked through the official OpenAI client."""

from concurrent.futures import ThreadPoolExecutor

import engines
import openai
import pytest

from vllm_slimspec.engine.acceptance import from_server
from vllm_slimspec.engine.server import Server

K = 3


@pytest.fixture(scope="module")
def served(pair, tmp_path_factory):
    """A server of a truncated vocabulary: 300 rows, padded to 320, of which rank 0 has 160 and rank 1 has 140 and the
    padding."""
    import json

    p = pair("llama", "truncated")
    speculative = json.dumps({"model": str(p.drafter), "num_speculative_tokens": K})
    server = Server(
        p.target,
        [
            *("--speculative-config", speculative, "--tensor-parallel-size", "2", "--dtype", "float32"),
            *("--max-model-len", "256", "--max-num-seqs", "8", "--enforce-eager", "--served-model-name", "tiny"),
        ],
        log=tmp_path_factory.mktemp("serve") / "server.log",
        # Each rank needs a core of its own to be bound to; the engine runs in processes of its own.
        env={"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    )
    with server:
        yield p, server


def _ask(client, prompt, **options):
    answer = client.completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=engines.TOKENS,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
        **options,
    )
    if not options.get("stream"):
        return answer.choices[0].token_ids
    return [token for part in answer for choice in part.choices for token in choice.token_ids or []]


def test_two_ranks_answer_as_the_target_alone(served, engine):
    """Catches: ids of one rank's shard taken for global ones, or a served path that differs from the offline one."""
    pair, server = served
    alone = engines.generate(engine(pair.target), pair.prompts[:8])
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    before = from_server(server.url)
    assert _ask(client, pair.prompts[0]) == alone[0]
    assert _ask(client, pair.prompts[1], stream=True) == alone[1]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda p: _ask(client, p), pair.prompts[:8])) == alone
    two_ranks = from_server(server.url) - before

    drafted = engine(pair.target, pair.drafter)
    engines.generate(drafted, [pair.prompts[0]])
    engines.generate(drafted, [pair.prompts[1]])
    engines.generate(drafted, pair.prompts[:8])
    from vllm_slimspec.engine.acceptance import from_engine

    # The very same drafts as one rank makes: wrong ids would be rejected, and only this would show it.
    assert two_ranks.length > 1.5
    assert two_ranks == from_engine(drafted)


def test_log_of_the_server_names_the_path_that_drafts(served):
    """Catches: a server's log from which a user cannot tell whether the fused path runs."""
    _, server = served
    log = server.log.read_text(errors="replace")
    assert "SlimSpec draft head: rank 16 of 64, 300 of 512 tokens" in log
    assert "fused argmax (torch)" in log
    assert "drafting by the fused path" in log
    assert "dense path" not in log
