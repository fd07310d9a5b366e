"""Every error that ends a training run early is one line, and leaves the data as it was."""

import json
import resource
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import DOCUMENTS, FLAGS, LAYERS, TOKENS, write_work
from transformers import AutoModelForCausalLM, GPT2Config
from typer.testing import CliRunner

from vllm_slimspec.cli import app
from vllm_slimspec.train.launch import fit
from vllm_slimspec.train.states import write_states
from vllm_slimspec.train.store import flaw


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return write_work(tmp_path_factory.mktemp("errors"))


def command(*arguments):
    """Return exit code and stderr of ``slimspec train``."""
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    return result.exit_code, result.stderr


def fit_command(work, output, *flags):
    return command("fit", "--target", work / "llama", "--data-path", work / "states", "--output-path", output, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rank", "33"), "error: rank=33 does not fit hidden_size=32"),
        (("--loss", "mse"), "error: --loss mse: there is no such loss; choose one of kl, nla, lk_hybrid, greedy"),
        (("--loss-fn", "mse"), "Unknown loss function 'mse'"),
    ],
)
def test_bad_training_flag_is_one_line_and_leaves_no_folder(work, tmp_path, flags, message):
    """Catches: a traceback, or a folder left behind by a run that never began."""
    code, text = fit_command(work, tmp_path / "d", *flags)
    assert (code, text.count("\n")) == (1, 1)
    assert message in text
    assert not list(tmp_path.iterdir())


def test_drafter_that_vllm_would_not_load_is_refused_before_training(work, tmp_path):
    """Catches: hours of training for an activation that no vLLM drafter has, reported only by the last step."""
    code, text = fit_command(work, tmp_path / "d", "--draft-hidden-act", "gelu")
    assert (code, "Traceback" in text) == (1, False)
    assert "error: the drafter to be trained: hidden_act='gelu', but vLLM's drafters support only silu" in text
    assert "--draft-hidden-act silu" in text
    assert not (tmp_path / "d").exists()


def test_run_with_a_bad_later_stage_is_refused_before_its_first(work, tmp_path):
    """Catches: a rank that is refused only after the target has answered for hours."""
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"input_ids": [1, 2]}) + "\n")
    code, text = command(
        "--target", work / "llama", "--prompts", tmp_path / "prompts.jsonl", "--output-path", tmp_path / "d",
        "--rank", "33",
    )  # fmt: skip
    assert (code, text.count("\n")) == (1, 1)
    assert text.startswith("error: rank=33 does not fit")
    assert [file.name for file in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_target_without_the_wanted_layers_is_refused(work, tmp_path):
    """Catches: a traceback from a hook, or a folder that is claimed for states that can never come."""
    small = GPT2Config(vocab_size=96, n_embd=32, n_layer=4, n_head=2, n_positions=64)
    AutoModelForCausalLM.from_config(small).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="GPT2LMHeadModel keeps no decoder layers"):
        write_states(tmp_path / "gpt2", DOCUMENTS, tmp_path / "s", layer_ids=LAYERS)
    with pytest.raises(ValueError, match=r"distinct and within \[0, 3\]"):
        write_states(work / "llama", DOCUMENTS, tmp_path / "s", layer_ids=[0, 1, 9])
    assert not (tmp_path / "s").exists()


@contextmanager
def largest_file(size):
    """Make the system refuse to write a larger file within this context, as a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_while_states_are_written_is_one_line(work, tmp_path, injected):
    """Catches: a traceback of safetensors, or half a file that is taken for a whole one."""
    with largest_file(4000), pytest.raises(OSError, match=r"hs_0\.safetensors: not written .*; what is there is kept"):
        write_states(work / "llama", DOCUMENTS, tmp_path / "s", layer_ids=LAYERS)
    assert not list((tmp_path / "s/hidden_states").iterdir())
    write_states(work / "llama", DOCUMENTS, tmp_path / "s", layer_ids=LAYERS)
    assert not any(flaw(tmp_path / "s", i, ids) for i, ids in enumerate(TOKENS))
    injected("no room on the disk: training")


def test_full_disk_at_a_checkpoint_keeps_the_earlier_one(work, tmp_path, injected):
    """Catches: a run that cannot be resumed because half a checkpoint took the place of a whole one."""
    fit(work / "llama", work / "states", tmp_path / "whole", **FLAGS)
    with largest_file(20_000), pytest.raises(OSError, match=r"a checkpoint was not written .*; the last one is whole"):
        fit(work / "llama", work / "states", tmp_path / "d", **FLAGS)
    assert not (tmp_path / "d").exists()
    fit(work / "llama", work / "states", tmp_path / "d", **FLAGS)
    whole = load_file(tmp_path / "whole/model.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "d/model.safetensors"), whole, rtol=0, atol=0)
    injected("no room on the disk: training")


@pytest.fixture
def server(work):
    """A stand-in for vLLM's side of online training, which sends the states of ``work`` for so many requests."""

    class Handler(BaseHTTPRequestHandler):
        left = 0

        def do_GET(self):
            self._answer({"object": "list", "data": [{"id": str(work / "llama"), "object": "model"}]})

        def do_POST(self):
            ids = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
            if Handler.left == 0:
                self.send_error(503)
                return
            Handler.left -= 1
            file = work / f"online-{threading.get_ident()}-{Handler.left}.safetensors"
            file.write_bytes((work / "states/hidden_states" / f"hs_{TOKENS.index(ids)}.safetensors").read_bytes())
            choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": None, "prompt_token_ids": ids}
            self._answer(
                {
                    "id": "0",
                    "object": "text_completion",
                    "created": 0,
                    "model": "m",
                    "choices": [choice],
                    "kv_transfer_params": {"hidden_states_path": str(file)},
                }
            )

        def _answer(self, body):
            content = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield Handler, f"http://127.0.0.1:{running.server_port}/v1"
        running.shutdown()


def test_training_is_resumed_after_its_states_server_went_away(work, tmp_path, server, injected):
    """Catches: documents silently left out, a traceback, or steps lost when the server of hidden states goes away."""
    handler, url = server
    online = tmp_path / "online"
    write_states(work / "llama", DOCUMENTS, online, layer_ids=LAYERS, keep=3)  # for the head to start from
    flags = {**FLAGS, "on_missing": "generate", "vllm_endpoint": url, "max_retries": 0}
    flags["generation_validation_retries"] = 0
    handler.left = 10**9
    fit(work / "llama", online, tmp_path / "whole", **flags)
    handler.left = 20
    with pytest.raises(ConnectionError, match=f"{url}: no hidden states any more .*; start vLLM again"):
        fit(work / "llama", online, tmp_path / "d", **flags)
    states = list(Path(tmp_path / "d.run/checkpoints").glob("*/training_state.json"))
    assert json.loads(states[0].read_text())["global_step"] > 0
    handler.left = 10**9
    fit(work / "llama", online, tmp_path / "d", **flags)
    whole, again = (json.loads((tmp_path / name / "slimspec.json").read_text()) for name in ("whole", "d"))
    assert again["steps"] == whole["steps"]
    assert again["held_out"] == whole["held_out"]
    injected("the server of hidden states gone in the middle of training")
