"""A served SlimSpec drafter while something fails: the answers stay the target's, or there is an error and no
answer."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import drafters
import httpx
import openai
import psutil
import pytest

from vllm_slimspec.engine.acceptance import from_server
from vllm_slimspec.engine.server import Server

pytestmark = pytest.mark.broad

HERE = Path(__file__).parent
TOKENS = 48
K = 3


class Served:
    """`vllm serve` with a copy of the drafter, which the tests may break."""

    def __init__(self, pair, folder: Path) -> None:
        self.pair, self.drafter = pair, folder / "drafter"
        self.restore()
        speculative = json.dumps({"model": str(self.drafter), "num_speculative_tokens": K})
        self.server = Server(
            pair.target,
            [
                *("--speculative-config", speculative, "--dtype", "float32", "--max-model-len", "256"),
                *("--max-num-seqs", "8", "--enforce-eager", "--served-model-name", "tiny"),
                *("--worker-extension-cls", "poison.Poison"),
            ],
            log=folder / "server.log",
            env={
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
                "VLLM_SERVER_DEV_MODE": "1",  # for /collective_rpc
                "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
            },
        )
        self.client = openai.OpenAI(base_url=f"{self.server.url}/v1", api_key="none", max_retries=0, timeout=120)

    def restore(self) -> None:
        """Put the drafter's folder back as it was."""
        shutil.rmtree(self.drafter, ignore_errors=True)
        shutil.copytree(self.pair.drafter, self.drafter)

    def ask(self, prompts, **options):
        """Return greedy token ids for each prompt, and the acceptance length meanwhile."""
        before = from_server(self.server.url)
        extra = {"ignore_eos": True, "return_token_ids": True}
        answer = self.client.completions.create(
            model="tiny", prompt=prompts, max_tokens=TOKENS, temperature=0, extra_body=extra, **options
        )
        return [choice.token_ids for choice in answer.choices], (from_server(self.server.url) - before).length

    def call(self, method: str):
        """Call a method of the worker's extension."""
        answer = httpx.post(f"{self.server.url}/collective_rpc", json={"method": method}, timeout=60)
        return answer.raise_for_status().json()["results"][0]

    def engine_process(self) -> psutil.Process:
        """Return the process that holds the models."""
        children = psutil.Process(self.server.process.pid).children(recursive=True)
        return next(child for child in children if "EngineCore" in " ".join(child.cmdline()))


@pytest.fixture(scope="module")
def served(pair, tmp_path_factory):
    running = Served(pair("llama", "full"), tmp_path_factory.mktemp("faults"))
    with running.server:
        yield running


@pytest.fixture(scope="module")
def answers(served):
    """The answers before anything fails."""
    ids, length = served.ask(served.pair.prompts[:6])
    assert length > 1.5
    return ids


def test_nan_in_hidden_states_leaves_the_answers_the_targets(served, answers, injected):
    """Catches: a NaN that becomes an id out of range, reaches the target's output, or stays in the drafter."""
    prompts = served.pair.prompts
    served.call("poison")
    ids, length = served.ask(prompts[:6])
    seen = served.call("cure")
    assert ids == answers
    assert length < 1.2  # the drafts were worthless
    assert seen["nan_rows"] > 100
    assert 0 <= seen["lowest"] <= seen["highest"] < 512
    # vLLM's attention multiplies what it masks by zero, so a NaN lives on in cache blocks until they are written again.
    assert served.ask(prompts[:6])[0] == answers
    ids, length = served.ask(prompts[:6])
    assert ids == answers
    assert length > 1.5
    injected("NaN in a hidden state that the drafter starts from", seen["nan_rows"], 3 * len(answers))


def test_drafter_files_altered_while_serving_change_no_answer(served, answers, injected):
    """Catches: drafter files that are read again, or still mapped into memory, while serving."""
    weights = served.drafter / "model.safetensors"
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    ids, length = served.ask(served.pair.prompts[:6])
    assert ids == answers
    assert length > 1.5
    os.truncate(weights, 0)
    assert served.ask(served.pair.prompts[:6])[0] == answers
    shutil.rmtree(served.drafter)
    ids, length = served.ask(served.pair.prompts[:6])
    assert ids == answers
    assert length > 1.5
    injected("the drafter's files overwritten, cut to nothing, deleted while serving", 3, 3 * len(answers))


def test_killed_engine_ends_requests_with_errors_and_restarts(served, answers, injected):
    """Catches: clients that wait forever, a server that stays up without an engine, or one that cannot start again."""
    served.call("hang")
    stream = served.client.completions.create(
        model="tiny",
        prompt=served.pair.prompts[0],
        max_tokens=200,  # more than ten draft steps can bring
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    served.engine_process().kill()
    with pytest.raises((openai.OpenAIError, httpx.HTTPError)) as error:
        list(stream)
    assert not isinstance(error.value, openai.APITimeoutError | httpx.TimeoutException)
    assert served.server.process.wait(60) is not None
    served.server.close()

    served.restore()
    with served.server:
        assert served.ask(served.pair.prompts[:6])[0] == answers
    injected("the engine process killed in the middle of an answer", 1, len(answers))


NO_MEMORY = """
import resource, sys
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm_slimspec.drafters.served import SlimSpecLlamaForCausalLM

config = EngineArgs(
    model=sys.argv[1], skip_tokenizer_init=True, max_model_len=128, dtype="float32", load_format="dummy",
    speculative_config={"model": sys.argv[2], "num_speculative_tokens": 3},
).create_engine_config()
with set_current_vllm_config(config):
    init_distributed_environment(1, 0, f"file://{sys.argv[3]}", 0, "gloo")
    initialize_model_parallel(1, 1)
    pages = int(open("/proc/self/statm").read().split()[0])
    size = pages * resource.getpagesize() + int(sys.argv[4])
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    SlimSpecLlamaForCausalLM(vllm_config=config)
"""


def test_head_that_memory_cannot_hold_is_an_error_with_advice(tmp_path, injected):
    """Catches: an allocator's message that does not say what did not fit, or what to do."""
    from transformers import LlamaConfig

    vocab = 1 << 20  # 256 MB each for the embeddings and for up
    sizes = drafters.config(vocab_size=vocab, draft_vocab_size=vocab, lm_head_rank=drafters.D)
    target = {k: v for k, v in sizes.items() if k not in ("lm_head_rank", "draft_vocab_size", "architectures")}
    LlamaConfig(**target | {"num_hidden_layers": 4, "architectures": ["LlamaForCausalLM"]}).save_pretrained(
        tmp_path / "t"
    )
    drafters.write(tmp_path / "d", sizes, {})
    command = [sys.executable, "-c", NO_MEMORY, tmp_path / "t", tmp_path / "d", tmp_path / "rendezvous", str(400 << 20)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert f"MemoryError: {tmp_path / 'd'}: no memory for a draft head of 268.5 MB" in last, done.stderr[-2000:]
    injected("no memory for the draft head at load")
    assert "tensor-parallel" in last
