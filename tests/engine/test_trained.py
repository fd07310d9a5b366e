"""The states that training learns from and the drafters that it makes, compared with the real engine."""

import json
import subprocess
import sys

import engines
import pytest
import torch
from engines import TOKENS, drafter_of, generate, record
from speculators.models.eagle3.data import shift_batch
from transformers import AutoModelForCausalLM

from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.engine.acceptance import from_engine
from vllm_slimspec.train.answers import write_answers
from vllm_slimspec.train.model import SlimSpecEagle3Config, SlimSpecEagle3Model
from vllm_slimspec.train.states import hidden_states

K = 2


@pytest.fixture(params=["llama-truncated", "qwen3-full"])
def trained(request, pair):
    """A pair of target and drafter, and the drafter as speculators' model."""
    p = pair(*request.param.split("-"))
    checkpoint = max(p.drafter.with_name("drafter.run").glob("checkpoints/[0-9]*"), key=lambda epoch: int(epoch.name))
    config = SlimSpecEagle3Config.from_pretrained(str(checkpoint))
    config.transformer_layer_config._attn_implementation = "sdpa"
    return p, SlimSpecEagle3Model.from_pretrained(str(checkpoint), config=config).eval()


@torch.inference_mode()
def drafts_in_training(model, target, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each draft step, with the tokens given: the head's input [T - 1, D] and the target ids drafted [T - 1]."""
    (states,) = hidden_states(target, [ids], model.target_layer_ids)
    batch = shift_batch(
        {
            "input_ids": ids,
            "hidden_states": states[:, :-1].flatten(1),
            "verifier_last_hidden_states": states[:, -1],
            "loss_mask": torch.ones_like(ids),
            "lengths": torch.tensor([len(ids)]),
            "position_ids": torch.arange(len(ids)),
        }
    )
    entered: list[torch.Tensor] = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: entered.append(args[0][0]))
    drafts = model(
        hidden_states=batch["hidden_states"][None],
        input_ids=batch["input_ids"][None],
        position_ids=batch["position_ids"][None],
        document_ids=torch.zeros_like(batch["input_ids"])[None],
        ttt_steps=K,
    )
    handle.remove()
    d2t = 0 if model.d2t is None else model.d2t
    to_target = torch.arange(model.draft_vocab_size) + d2t
    return [(hidden, to_target[draft[0]]) for hidden, draft in zip(entered, drafts, strict=True)]


def test_training_and_serving_draft_the_same_tokens(trained, engine):
    """Catches: a norm, a rotary embedding or target layers that differ between training and serving, or tokens and
    states one place apart, at which acceptance alone only hints. The same states go into both heads, and every draft is
    compared."""
    p, model = trained
    target = AutoModelForCausalLM.from_pretrained(p.target).eval()
    llm = engine(p.target, p.drafter, k=K)
    recorded = record(drafter_of(llm))
    compared = [0] * K
    for prompt in p.prompts[:4]:
        recorded.fused.clear()
        ids = torch.tensor(prompt + generate(llm, [prompt])[0])
        training = drafts_in_training(model, target, ids)
        known = len(prompt) + 1  # tokens that the drafter may see: the prompt, and one by the target
        for cycle in zip(*[iter(recorded.fused)] * K, strict=True):
            accepted = 0
            for step, (hidden, draft) in enumerate(cycle):
                # The drafter that has seen x[known - 1] drafts x[known]; training pairs it with the state one earlier.
                slot = known - 2
                if known + step >= len(ids) or accepted < step:
                    break  # serving goes on from its own draft, training from the target's token: not comparable
                torch.testing.assert_close(hidden[0], training[step][0][slot], rtol=1e-3, atol=1e-4)
                assert draft[0] == training[step][1][slot]
                compared[step] += 1
                accepted += int(draft[0] == ids[known + step])
            known += accepted + 1
    assert min(compared) > 20


@pytest.mark.broad
def test_train_command_goes_from_prompts_to_a_served_drafter(pair, engine, tmp_path):
    """Catches: stages that do not fit together, hours of answers before a refusal, a second run that overwrites, or a
    printed acceptance length that vLLM does not serve, because prompts are easy or each place counts once."""
    p = pair()
    system = p.prompts[10]  # the same before every question: a drafter soon knows it by heart
    questions = [p.prompts[11][first : first + 4 + first % 5] for first in range(30)]
    questions += [prompt[:length] for prompt in p.prompts[:10] for length in range(4, len(prompt))]
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"input_ids": system + question}) + "\n" for question in questions)
    )
    arguments = f"train --target {p.target} --prompts {tmp_path}/prompts.jsonl --output-path {tmp_path}/drafter"
    arguments += f" --max-tokens {TOKENS} --temperature 0 --rank 8 --target-layer-ids 1 2 3 --total-seq-len 256"
    arguments += " --hidden-states-dtype float32 --epochs 3 --lr 4e-3 --scheduler-warmup-steps 5"
    options = json.dumps({name: engines.OPTIONS[name] for name in ("dtype", "max_model_len", "enforce_eager")})
    command = [sys.executable, "-m", "vllm_slimspec", *arguments.split()]
    result = subprocess.run([*command, "--engine-args", options], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert DraftCheckpoint.open(tmp_path / "drafter").spec.rank == 8

    printed = json.loads((tmp_path / "drafter/slimspec.json").read_text())["held_out"]
    assert f"acceptance length {printed['length']:.2f} (95%: " in result.stderr
    lines = [json.loads(line) for line in (tmp_path / "drafter.run/answers.jsonl").read_text().splitlines()]
    held_out = lines[int(len(lines) * 0.9) :]
    prompts = [line["input_ids"][: line["prompt_tokens"]] for line in held_out]
    answers = [line["input_ids"][line["prompt_tokens"] :] for line in held_out]
    llm, steps = engine(p.target, tmp_path / "drafter"), len(printed["accepted"])
    # The walk stops where fewer than K tokens of the answer are left; so far, every cycle is one that is served.
    assert generate(llm, prompts, TOKENS - steps + 1) == [answer[: TOKENS - steps + 1] for answer in answers]
    walked = from_engine(llm)
    assert (walked.drafts, walked.length) == (printed["cycles"], pytest.approx(printed["length"], abs=1e-9))
    assert walked.per_position == pytest.approx(printed["accepted"])
    assert generate(llm, prompts, TOKENS) == answers
    served = from_engine(llm) - walked
    assert printed["low"] < served.length < printed["high"]

    assert generate(llm, p.prompts[:2]) == generate(engine(p.target), p.prompts[:2])
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1
    assert (
        again.stderr
        == f"error: {tmp_path}/drafter: exists and is not an empty folder; remove it or choose another output\n"
    )


def test_recorded_answers_are_the_targets_own(pair, engine, tmp_path):
    """Catches: prompts and answers that are mixed up, or an answer that goes on after its end or is cut before it."""
    p = pair()
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"input_ids": prompt}) + "\n" for prompt in p.prompts))
    options = engines.OPTIONS | {"skip_tokenizer_init": False}
    assert write_answers(p.target, prompts, output, temperatures=[0.0], max_tokens=16, engine=options) == len(p.prompts)
    expected = generate(engine(p.target), p.prompts, tokens=16)
    end = AutoModelForCausalLM.from_pretrained(p.target).config.eos_token_id
    for line, prompt, answer in zip(output.read_text().splitlines(), p.prompts, expected, strict=True):
        stop = answer.index(end) + 1 if end in answer else len(answer)
        assert json.loads(line) == {"input_ids": prompt + answer[:stop], "prompt_tokens": len(prompt)}
