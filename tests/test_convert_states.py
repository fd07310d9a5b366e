"""Head states on disk and what is computed from them: splits, resumed collections, and draft-and-verify cycles over an
answer."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from vllm_slimspec.convert.evaluate import Tau, evaluate
from vllm_slimspec.convert.heads import Factors
from vllm_slimspec.engine import recording as collect
from vllm_slimspec.engine.acceptance import Acceptance
from vllm_slimspec.engine.head_states import HeadStates, Rows, StatesWriter, concatenate
from vllm_slimspec.engine.prompts import read_prompts, tokenize
from vllm_slimspec.errors import CheckpointError, EngineError, OptionError

D, K = 16, 3
RECIPE = {"target": "t", "drafter": "d", "K": K}


def rows(document: int, places: int = 10, seed: int = 0) -> Rows:
    """Return one document with a cycle from each place."""
    torch.manual_seed(seed + document)
    step = torch.arange(K).repeat(places)
    pos = torch.arange(places).repeat_interleave(K) + step
    n = places * K
    return Rows(torch.randn(n, D), torch.full((n,), document), step, pos, torch.randint(5, (n,)))


def collection(folder, documents=10) -> HeadStates:
    writer = StatesWriter(folder, RECIPE)
    for document in range(documents):
        writer.write(document, rows(document))
    return writer.finish()


def test_written_states_are_read_back_unchanged(tmp_path):
    """Catches: a column read back in another type, or a row that is in both splits or in none."""
    states = collection(tmp_path / "s")
    assert (states.rows, states.hidden_size, states.dtype, states.steps) == (10 * 10 * K, D, torch.float32, K)
    parts = [concatenate(list(states.read(held_out))) for held_out in (True, False)]
    assert parts[0].doc.unique().tolist() == [0, 5]
    assert sorted({*parts[0].doc.tolist(), *parts[1].doc.tolist()}) == list(range(10))
    expected = rows(5)
    read = parts[0][parts[0].doc == 5]
    for column in ("hidden", "doc", "step", "pos", "next_token"):
        assert torch.equal(getattr(read, column), getattr(expected, column))


def test_sample_of_states_holds_whole_documents(tmp_path):
    """Catches: a sample that leaves holes in the answers, over which draft-and-verify cycles are then walked."""
    sample = collection(tmp_path / "s").sample(False, limit=3 * 10 * K)
    assert len(sample.doc.unique()) == 3
    assert len(sample) == 3 * 10 * K


def test_states_of_another_tool_need_hidden_states_only(tmp_path):
    """Catches: states of other tools refused for columns that those tools cannot know."""
    (tmp_path / "index.json").write_text('{"format": 1}')
    save_file({"hidden": torch.randn(3000, D)}, tmp_path / "states-00000.safetensors")
    states = HeadStates.open(tmp_path)
    held_out, rest = states.sample(True, 10_000), states.sample(False, 10_000)
    assert len(held_out) + len(rest) == 3000
    assert len(held_out) == pytest.approx(600, abs=300)
    assert held_out.step is None


def test_states_of_another_tool_are_identified_by_their_content(tmp_path):
    """Catches: a distillation resumed on other states than it began with, because their folder and size are the
    same."""
    (tmp_path / "index.json").write_text('{"format": 1}')
    found = []
    for seed in (0, 0, 1):
        hidden = torch.randn(300, D, generator=torch.Generator().manual_seed(seed))
        save_file({"hidden": hidden}, tmp_path / "states-00000.safetensors")
        found.append(HeadStates.open(tmp_path).index)
    assert found[0] == found[1] != found[2]


def test_interrupted_collection_is_resumed(tmp_path):
    """Catches: an unfinished folder taken for a whole one, work done twice, or states of two recipes in one folder."""
    first = StatesWriter(tmp_path / "s", RECIPE)
    first.write(0, rows(0))
    with pytest.raises(CheckpointError, match="is not complete"):
        HeadStates.open(tmp_path / "s")
    second = StatesWriter(tmp_path / "s", RECIPE)
    assert [second.has(group) for group in (0, 1)] == [True, False]
    assert second.count() == 10 * K
    with pytest.raises(CheckpointError, match="other values of K"):
        StatesWriter(tmp_path / "s", RECIPE | {"K": 5})
    second.write(1, rows(1))
    assert second.finish().rows == 2 * 10 * K
    assert StatesWriter(tmp_path / "s", RECIPE).complete


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "index.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "index.json").write_text('{"format": 9}'), "format 9 is not known"),
        (lambda f: (f / "states-00003.safetensors").unlink(), "not those that index.json lists"),
        (lambda f: save_file({"hidden": torch.ones(2, D)}, f / "states-00003.safetensors"), "sha256"),
        (lambda f: [p.unlink() for p in f.glob("states-*")], "holds no states"),
    ],
)
def test_incomplete_or_damaged_collection_is_refused(spoil, message, tmp_path):
    """Catches: conversions calibrated on half a collection."""
    collection(tmp_path / "s")
    spoil(tmp_path / "s")
    with pytest.raises(CheckpointError, match=message):
        HeadStates.open(tmp_path / "s")


def test_nan_in_states_is_refused_with_its_row(tmp_path):
    """Catches: a NaN in the states that makes every statistic NaN and is found much later."""
    bad = rows(1)
    bad.hidden[7, 2] = torch.nan
    writer = StatesWriter(tmp_path / "s", RECIPE)
    writer.write(0, rows(0))
    writer.write(1, bad)
    with pytest.raises(CheckpointError, match=r"states-00001.safetensors: row 7 holds NaN"):
        concatenate(list(writer.finish().read(held_out=False)))


def test_states_of_one_split_only_are_refused(tmp_path):
    """Catches: a head measured on the same states on which it was calibrated, because there were too few documents for
    two splits."""
    with pytest.raises(CheckpointError, match="of one split"):
        collection(tmp_path / "s", documents=1).sample(False, 10)


def dying(*_, **__):
    raise RuntimeError("CUDA error: out of memory\nTry something")


@pytest.mark.parametrize("when", ["at the start", "at work"])
def test_dying_engine_is_one_line_with_advice(when, monkeypatch):
    """Catches: a traceback of vLLM's where the user needs to know what to do."""
    engine = SimpleNamespace(llm_engine=SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: None)))
    engine.generate = dying
    started = dying if when == "at the start" else lambda **_: engine
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=started, SamplingParams=lambda **_: None))
    with (
        pytest.raises(EngineError, match=r"out of memory Try something\); what was recorded is kept") as error,
        collect._engine("target", "drafter", K, {}) as llm,
    ):
        collect._answer(llm, [(0, [1])], 8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}, {"distributed_executor_backend": "mp"}]
)
def test_engine_of_several_processes_is_refused_before_it_starts(options):
    """Catches: an AttributeError after a target was loaded on two GPUs, or one device refused as if it were two."""
    for start in (collect.collect, collect.collect_again):
        with pytest.raises(OptionError, match=f"{next(iter(options))}=.*recorded in one process"):
            start("target", "drafter", [], "states", k=K, engine=options, dtype="auto")
    collect.check_engine({"tensor_parallel_size": 1, "max_model_len": 64})


class Letters:
    """A tokenizer of single letters, whose chat template marks the end."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        return "".join(m["content"] for m in messages) + ">"


def prompts(tmp_path, *lines, limit=8):
    file = tmp_path / "p.jsonl"
    file.write_bytes("\n".join(lines).encode())
    return tokenize(read_prompts(file), Letters(), 256, limit, file)


def test_every_form_of_prompt_is_read_and_repeated_ones_are_dropped(tmp_path):
    """Catches: a form of prompt that is read as another, or the same prompt asked twice and recorded as one
    document."""
    lines = (
        '{"prompt": "ab"}',
        "",
        '{"messages": [{"role": "user", "content": "ab"}]}',
        '{"text": "a long document"}',
        '{"input_ids": [1, 2]}',
        '{"prompt": "ab"}\r',
        '{"prompt": "\x85"}',
    )
    found = prompts(tmp_path, *lines)
    assert found == [[97, 98], [97, 98, 62], [ord(c) for c in "a long d"], [1, 2], [0x85]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"prompt": "a"}', "{prompt}"], "p.jsonl:2: not a prompt"),
        (['{"question": "a"}'], "p.jsonl:1: not a prompt"),
        (['{"prompt": 3}'], "p.jsonl:1: not a prompt"),
        (["[]"], "p.jsonl:1: not a prompt"),
        (['{"messages": [{"role": "user"}]}'], "p.jsonl:1: the target's tokenizer refuses it"),
        (['{"prompt": "abcdefghi"}'], "p.jsonl:1: the prompt has 9 tokens, 1 to 8 fit"),
        (['{"prompt": ""}'], "p.jsonl:1: the prompt has 0 tokens"),
        (['{"prompt": "\u20ac"}'], "p.jsonl:1: token ids are 0 to 255 in the target's vocabulary, here 8364"),
        (['{"input_ids": ["x"]}'], "p.jsonl:1: the target's tokenizer refuses it"),
        ([""], "holds no prompt"),
    ],
)
def test_bad_prompt_line_is_refused_by_its_number(lines, message, tmp_path):
    """Catches: an error about a prompt file of a thousand lines that does not say which line is wrong."""
    with pytest.raises(CheckpointError, match=message) as error:
        prompts(tmp_path, *lines)
    assert "\n" not in str(error.value)


def simulated_engine(wanted: list[list[int]], drafted: dict[tuple[int, int, int], int]) -> Acceptance:
    """Count as an engine does that drafts ``drafted[document, start, step]`` while the target says ``wanted``."""
    cycles, accepted = 0, 0
    for document, tokens in enumerate(wanted):
        place = 0
        while place + K <= len(tokens):
            hits = 0
            while hits < K and drafted[document, place, hits] == tokens[place + hits]:
                hits += 1
            cycles, accepted, place = cycles + 1, accepted + hits, place + hits + 1
    return Acceptance(cycles, accepted, ())


def test_tau_equals_the_acceptance_length_that_an_engine_counts():
    """Catches: an acceptance length with all places weighted alike, although an engine starts more cycles behind
    rejected drafts."""
    torch.manual_seed(0)
    vocab, length, documents = 6, 40, 8
    dense, head = torch.randn(vocab, D), Factors(torch.randn(4, D), torch.randn(vocab, 4))
    wanted = torch.randint(vocab, (documents, length))
    parts, best = [], {}
    for document in range(documents):
        places = torch.arange(length - K + 1)
        pos = places.repeat_interleave(K) + torch.arange(K).repeat(len(places))
        # Easy where the answer is in its first half: only then do the starts of cycles matter.
        hidden = torch.randn(len(pos), D) + 4 * dense[wanted[document][pos]] * (pos < length // 2)[:, None]
        step = torch.arange(K).repeat(len(places))
        parts.append(Rows(hidden, torch.full_like(pos, document), step, pos, wanted[document][pos]))
        for name, scores in (("dense", hidden @ dense.T), ("low", hidden @ head[0].T @ head[1].T)):
            for p, j, token in zip(pos.tolist(), step.tolist(), scores.argmax(-1).tolist(), strict=True):
                best[name, document, p - j, j] = token
    found = evaluate(dense, {"low": head}, concatenate(parts), torch.arange(vocab), rerank=[1, 2, vocab])
    for name, tau in (("dense", found.dense_tau), ("low", found.heads["low"].tau)):
        engine = simulated_engine(wanted.tolist(), {key[1:]: t for key, t in best.items() if key[0] == name})
        assert tau.value == pytest.approx(engine.length)
        assert tau.low < tau.value < tau.high
    # Re-ranking one changes nothing, re-ranking everything is the dense head, and re-ranking two is in between.
    assert found.heads["low"].rerank[1].tau == found.heads["low"].tau
    assert found.heads["low"].rerank[vocab].tau == found.dense_tau
    assert found.heads["low"].rerank[vocab].top1 == 1.0
    assert found.heads["low"].rerank[2].top1 == pytest.approx(found.heads["low"].recall[2])
    # The documents differ more than the heads do: drawn for both, they cancel.
    of_dense, tau = found.heads["low"].of_dense, found.heads["low"].tau
    assert of_dense.value == pytest.approx(tau.value / found.dense_tau.value)
    assert found.heads["low"].rerank[vocab].of_dense == Tau(1.0, 1.0, 1.0)


def test_metrics_of_a_head_equal_their_definitions():
    """Catches: p and q swapped in overlap or KL divergence, or a mean over the wrong thing."""
    torch.manual_seed(0)
    dense, hidden = torch.randn(7, D), torch.randn(50, D)
    states = Rows(hidden, torch.zeros(50, dtype=torch.long))
    same = evaluate(dense, {"same": Factors(torch.eye(D), dense)}, states, torch.arange(7)).heads["same"]
    assert (same.top1, same.recall[1], same.tau) == (1.0, 1.0, None)
    assert same.overlap == pytest.approx(1)
    assert same.kl == pytest.approx(0, abs=1e-6)
    low = Factors(torch.randn(3, D), torch.randn(7, 3))
    other = evaluate(dense, {"other": low}, states, torch.arange(7)).heads["other"]
    p, q = (hidden @ dense.T).softmax(-1), (hidden @ low[0].T @ low[1].T).softmax(-1)
    assert other.overlap == pytest.approx(float(torch.minimum(p, q).sum(-1).mean()), rel=1e-5)
    assert other.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)


def test_index_of_states_has_the_documented_keys(tmp_path):
    """Catches: a format of recorded states that is no longer the one in the documentation."""
    collection(tmp_path / "s")
    index = json.loads((tmp_path / "s" / "index.json").read_text())
    assert index.keys() == {"format", "D", "dtype", "K", "target", "drafter", "rows", "sha256s"}
