"""Conversion from end to end, without an engine: every public format gives a checked folder or one line of error."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import drafters
import pytest
import torch
import typer
from drafters import D, R, V
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from vllm_slimspec.commands.convert import convert as command
from vllm_slimspec.commands.convert import sweep_figure
from vllm_slimspec.convert import conversion
from vllm_slimspec.convert.conversion import Conversion
from vllm_slimspec.convert.distill import Recipe
from vllm_slimspec.convert.options import Options
from vllm_slimspec.convert.run import convert, sweep
from vllm_slimspec.convert.vocabulary import counts_from_text
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.drafters.source import Drafter
from vllm_slimspec.engine.head_states import HeadStates
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.spec import DENSE, DOWN, UP
from vllm_slimspec.target import Target, fingerprint

TRUNCATED = 64
K = 3


def write_target(folder: Path, head: torch.Tensor, **config) -> Path:
    folder.mkdir()
    sizes = {"hidden_size": D, "vocab_size": V, "num_hidden_layers": 4, "intermediate_size": 96}
    (folder / "config.json").write_text(json.dumps(sizes | config))
    name = "model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"
    save_file({name: head.contiguous()}, folder / "model.safetensors")
    return folder


def _of_a_target(width: int) -> dict[str, torch.Tensor]:
    """Return the tensors that a drafter needs, or needs in another shape, for a target of another width."""
    return {"fc.weight": torch.randn(D, 3 * width), "embed_tokens.weight": torch.randn(V, D)}


def write_head_states(folder: Path, documents: int = 20, length: int = 12, hidden_size: int = D, **columns) -> Path:
    """Write states of ``documents`` answers with a cycle from every place; by default only the column ``hidden``."""
    folder.mkdir()
    n = documents * length * K
    hidden = torch.randn(n, hidden_size, generator=torch.Generator().manual_seed(5))
    save_file({"hidden": hidden, **columns}, folder / "states-00000.safetensors")
    (folder / "index.json").write_text(json.dumps({"format": 1, "K": K}))
    return folder


def columns(hidden: torch.Tensor, head: torch.Tensor, ids: torch.Tensor, documents: int = 20, length: int = 12):
    """Return doc, step, pos, and next tokens of a target that follows the dense head except at every seventh token."""
    step = torch.arange(K).repeat(documents * length)
    start = torch.arange(length).repeat_interleave(K).repeat(documents)
    wanted = ids[(hidden @ head.T).argmax(-1)]
    wanted[::7] = (wanted[::7] + 1) % V
    return {
        "step": step.to(torch.uint8),
        "doc": torch.arange(documents).repeat_interleave(length * K).int(),
        "pos": (start + step).int(),
        "next_token": wanted,
    }


def form(name: str, folder: Path) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """Write a drafter with a head of rank R, in one of the public formats -> (folder, head [V, D], target ids [V])."""
    vocab = V if name in ("specforge-full", "no-head", "torchspec", "slimspec", "speculators-full") else TRUNCATED
    tensors = drafters.tensors(vocab)
    dense = drafters.dense(tensors)
    head, offsets = dense[DENSE], tensors.get("d2t", torch.zeros(vocab, dtype=torch.long))
    config = drafters.config(architectures=["LlamaForCausalLMEagle3"], draft_vocab_size=vocab, lm_head_rank=None)
    if name in ("eagle", "specforge-full"):
        t2d = torch.zeros(V, dtype=torch.bool)
        t2d[offsets + torch.arange(vocab)] = True
        dense |= {"t2d": t2d, "d2t": offsets}
    if name == "eagle":
        config["architectures"] = ["LlamaForCausalLM"]
    if name == "no-head":
        del dense[DENSE]
    if name.startswith("speculators"):
        dense = {n.replace("midlayer.", "layers.0."): t for n, t in dense.items()}
        top = {"draft_vocab_size": vocab, "speculators_model_type": "eagle3", "speculators_config": {}}
        top["eagle_aux_hidden_state_layer_ids"] = config.pop("eagle_aux_hidden_state_layer_ids")
        layer = {k: v for k, v in config.items() if k not in ("architectures", "draft_vocab_size", "rope_theta")}
        layer["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0}
        config = {"architectures": ["Eagle3Speculator"], **top, "transformer_layer_config": layer}
    if name == "torchspec":
        dense, config = tensors, drafters.config(architectures=["LlamaForCausalLMEagle3"], lm_head_rank=None)
        config["lm_head_rank_divisor"] = D // R
    if name == "slimspec":
        dense, config = tensors, drafters.config()
    return drafters.write(folder, config, dense), head, offsets + torch.arange(vocab)


FORMS = ("eagle", "specforge", "specforge-full", "speculators", "speculators-full", "no-head", "torchspec", "slimspec")


@pytest.fixture
def full_head():
    """A head of rank R for the target's whole vocabulary; the heads that `form` writes are parts of it."""
    return drafters.dense(drafters.tensors())[DENSE]


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("name", FORMS)
def test_head_that_has_rank_r_is_converted_without_loss(name, weighted, tmp_path, full_head):
    """Catches: a public format that is read wrongly in any way: its head, its map, or its body."""
    source, head, ids = form(name, tmp_path / "source")
    target = write_target(tmp_path / "target", full_head)
    states = write_head_states(tmp_path / "states")
    options = Options(
        str(source), tmp_path / "out", str(target), rank=R, hidden_states=states if weighted else None, force=True
    )
    done = convert(options)
    down, up = done.checkpoint.load(DOWN), done.checkpoint.load(UP)
    hidden = torch.randn(500, D)
    torch.testing.assert_close(
        (hidden @ down.T @ up.T).log_softmax(-1), (hidden @ head.T).log_softmax(-1), rtol=0, atol=1e-4
    )
    if weighted:
        assert done.evaluation.heads["low-rank"].top1 == 1.0
    offsets = ids - torch.arange(len(ids))
    assert ("d2t" in done.checkpoint.tensors) == bool(offsets.any())
    if "d2t" in done.checkpoint.tensors:
        assert torch.equal(done.checkpoint.load("d2t"), offsets)
    expected = {n.replace("midlayer.", "layers.0."): t for n, t in drafters.tensors().items() if "lm_head" not in n}
    written = {n.replace("midlayer.", "layers.0."): n for n in done.checkpoint.tensors}
    for tensor, value in expected.items():
        if tensor != "d2t":
            assert torch.equal(done.checkpoint.load(written[tensor]), value)
    assert "t2d" not in written


@pytest.mark.parametrize("name", ["torchspec", "slimspec"])
def test_low_rank_drafter_keeps_its_trained_factors(name, tmp_path):
    """Catches: trained factors replaced by a factorization of their product."""
    source, _, _ = form(name, tmp_path / "source")
    if name == "slimspec":  # at a rank that is not the default
        source = drafters.write(tmp_path / "other", drafters.config(lm_head_rank=5), drafters.tensors(rank=5))
    done = convert(Options(str(source), tmp_path / "out"))
    for tensor in (DOWN, UP):
        assert torch.equal(done.checkpoint.load(tensor), DraftCheckpoint.open(source).load(tensor))


def test_speculators_config_is_converted_as_vllm_reads_it(tmp_path):
    """Catches: a norm that vLLM assumes, or a rope that it reads from a nested key, lost in the conversion."""
    source, _, _ = form("speculators", tmp_path / "source")
    config = convert(Options(str(source), tmp_path / "out", rank=R)).checkpoint.config
    assert config["norm_before_residual"] is True
    assert (config["rope_theta"], config["rope_scaling"]) == (500000.0, {"rope_type": "llama3", "factor": 8.0})
    assert config["architectures"] == ["SlimSpecLlamaForCausalLMEagle3"]
    assert not {"speculators_config", "transformer_layer_config", "speculators_model_type"} & config.keys()


@pytest.mark.parametrize("tied", [False, True])
def test_full_vocabulary_takes_equal_rows_from_the_target(tmp_path, full_head, tied):
    """Catches: rows of drafter and target assumed to be equal instead of compared, or taken from the wrong ids."""
    source, _, ids = form("specforge", tmp_path / "source")
    checkpoint = DraftCheckpoint.open(source)
    tensors = {n: checkpoint.load(n) for n in checkpoint.tensors} | {DENSE: full_head[ids].contiguous()}
    source = drafters.write(tmp_path / "copy", checkpoint.config, tensors)
    target = write_target(tmp_path / "target", full_head, tie_word_embeddings=tied)
    states = write_head_states(tmp_path / "states")
    done = convert(Options(str(source), tmp_path / "out", str(target), rank=R, vocab="full", hidden_states=states))
    assert done.checkpoint.spec.draft_vocab_size == V
    assert "d2t" not in done.checkpoint.tensors
    assert done.evaluation.heads["low-rank"].top1 == 1.0


def test_target_without_a_head_or_a_word_about_it_is_tied(tmp_path, full_head):
    """Catches: a target refused because only its class, and not its config.json, says that embeddings and head are
    one."""
    target = write_target(tmp_path / "target", full_head, tie_word_embeddings=True)
    config = json.loads((target / "config.json").read_text())
    del config["tie_word_embeddings"]
    (target / "config.json").write_text(json.dumps(config))
    assert torch.equal(Target.open(target).head(), full_head)
    (target / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=r"holds no lm_head.weight"):
        Target.open(target).head()


@pytest.mark.parametrize("kind", ["quantized", "packed", "pickle", "torn", "index", "map"])
def test_unreadable_head_of_a_target_matters_only_where_it_is_needed(kind, tmp_path, full_head, caplog):
    """Catches: a target's unreadable head that stops a drafter with a head of its own, or a traceback where the
    target's rows are needed."""
    target = write_target(tmp_path / "target", full_head)
    weights, index = target / "model.safetensors", target / "model.safetensors.index.json"
    match kind:
        case "quantized":
            save_file({"lm_head.weight": full_head.to(torch.int8)}, weights)
        case "packed":  # beside embeddings that are not the head
            save_file({"lm_head.qweight": full_head.to(torch.int32), "model.embed_tokens.weight": full_head}, weights)
        case "pickle":
            weights.unlink()
            torch.save({}, target / "pytorch_model.bin")
        case "torn":
            index.write_text('{"weight_map": {"lm_head.weight": "model-1.safetensors"}}')
        case "index":
            index.write_text("[]")
        case "map":
            index.write_text('{"weight_map": {"lm_head.weight": 3}}')
    own, head, _ = form("specforge", tmp_path / "own")
    assert torch.equal(Drafter.open(own, Target.open(target)).head, head)
    assert "cannot be compared" in caplog.text
    with pytest.raises(CheckpointError) as error:
        Drafter.open(form("no-head", tmp_path / "headless")[0], Target.open(target))
    assert "\n" not in str(error.value)


def test_full_vocabulary_from_a_target_of_another_width_is_fitted(tmp_path):
    """Catches: a linear map from the target's rows that is fitted wrongly, or rows of the drafter's own that it
    overwrites."""
    torch.manual_seed(0)
    target_head, linear = torch.randn(V, 12), torch.randn(12, D)
    source, _, ids = form("specforge", tmp_path / "source")
    checkpoint = DraftCheckpoint.open(source)
    own = target_head[ids] @ linear
    config = checkpoint.config | {"target_hidden_size": 12}
    tensors = {n: checkpoint.load(n) for n in checkpoint.tensors} | {DENSE: own} | _of_a_target(12)
    source = drafters.write(tmp_path / "mapped", config, tensors)
    target = Target.open(write_target(tmp_path / "target", target_head, hidden_size=12))
    drafter, residual = Drafter.open(source, target).full_vocabulary(target)
    assert residual < 1e-4
    torch.testing.assert_close(drafter.head, target_head @ linear, rtol=1e-3, atol=1e-3)
    assert torch.equal(drafter.head[ids], own)


def test_residual_of_a_fitted_map_leaves_the_mean_row_out(tmp_path, caplog):
    """Catches: a fitted map that looks good because it explains the mean of all rows, or whose residual is not
    printed."""
    torch.manual_seed(0)
    source, _, _ = form("specforge", tmp_path / "source")
    checkpoint = DraftCheckpoint.open(source)
    tensors = {n: checkpoint.load(n) for n in checkpoint.tensors} | {DENSE: torch.randn(TRUNCATED, D) + 100}
    tensors |= _of_a_target(12)
    source = drafters.write(tmp_path / "shifted", checkpoint.config | {"target_hidden_size": 12}, tensors)
    target = Target.open(write_target(tmp_path / "target", torch.randn(V, 12) + 100, hidden_size=12))
    with pytest.raises(CheckpointError, match="no linear map"):
        Drafter.open(source, target).full_vocabulary(target)
    assert "least-squares map, residual" in caplog.text


def test_bytes_of_a_mixture_of_experts_count_the_experts_read(tmp_path, full_head):
    """Catches: a mixture of experts counted as one expert or as all of them, which predicts the speedup of another
    model."""
    dense = Target.open(write_target(tmp_path / "dense", full_head, intermediate_size=32))
    mixture = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    moe = Target.open(write_target(tmp_path / "moe", full_head, **mixture))
    expert = 2 * 4 * 3 * D * 32  # bytes of one in each of 4 layers
    assert [(moe.nbytes(k) - dense.nbytes(k)) // expert for k in (1, 2, 3, 5)] == [3, 5, 7, 7]


@pytest.mark.parametrize("key", ["eagle_aux_hidden_state_layer_ids", "layer_ids"])  # of runner V1, of V2
def test_aux_layers_are_read_from_the_keys_that_vllm_reads(key, tmp_path):
    """Catches: joint training on other layers than the drafter is served with, where only eagle_config names them."""
    named = {"eagle_config": {key: [0, 2, 3]}, "eagle_aux_hidden_state_layer_ids": None}
    config = drafters.config(architectures=["LlamaForCausalLMEagle3"], lm_head_rank=None, **named)
    source = drafters.write(tmp_path / "source", config, drafters.dense(drafters.tensors()))
    assert Drafter.open(source).config["eagle_aux_hidden_state_layer_ids"] == [0, 2, 3]


def test_fitted_map_that_explains_nothing_is_refused_early(tmp_path):
    """Catches: a full vocabulary made of noise, or refused only after hours of calibration."""
    source, _, _ = form("specforge", tmp_path / "source")
    target = write_target(tmp_path / "target", torch.randn(V, D))
    options = Options(str(source), tmp_path / "out", str(target), vocab="full", calibration=tmp_path / "no such file")
    with pytest.raises(CheckpointError, match=r"no linear map.*--vocab keep"):
        convert(options)


def test_truncation_by_frequencies_keeps_rows_and_map_together(tmp_path):
    """Catches: rows of a truncated head that do not belong to the ids in its map."""
    source, head, ids = form("specforge", tmp_path / "source")
    (tmp_path / "counts.json").write_text(json.dumps({str(int(ids[i])): 100 - i for i in (5, 3, 60)}))
    options = Options(str(source), tmp_path / "out", rank=3, vocab="3", frequencies=tmp_path / "counts.json")
    checkpoint = convert(options).checkpoint
    assert (checkpoint.load("d2t") + torch.arange(3)).tolist() == [int(ids[i]) for i in (3, 5, 60)]
    torch.testing.assert_close(checkpoint.load(UP) @ checkpoint.load(DOWN), head[[3, 5, 60]], rtol=1e-3, atol=1e-4)


def test_truncated_vocabulary_keeps_begin_and_end_of_text(tmp_path, full_head):
    """Catches: a drafter that can never draft the end of a text, tokens counted in other files or places, or ties that
    go to rare ids."""
    target = write_target(tmp_path / "target", full_head, bos_token_id=100)
    (target / "generation_config.json").write_text('{"eos_token_id": [90, 9]}')  # 9 has no row in the drafter
    source, _, _ = form("specforge", tmp_path / "source")
    (tmp_path / "text.jsonl").write_text('{"input_ids": [40, 40, 6]}\n{"input_ids": [6, 41, 41, 41, 40]}\n')
    options = Options(str(source), tmp_path / "out", str(target), rank=2, vocab="5", prompts=tmp_path / "text.jsonl")
    checkpoint = convert(options).checkpoint
    kept = checkpoint.load("d2t") + torch.arange(5)
    assert kept.tolist() == [0, 6, 40, 90, 100]  # 41 has no row either


def test_corpus_is_counted_with_the_targets_tokenizer_and_template(tmp_path, full_head):
    """Catches: a corpus counted in other ids than the target's, messages without their chat template, or a long text
    cut off."""
    target = write_target(tmp_path / "target", full_head)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(V)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.chat_template = "{% for message in messages %}t7 {{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(target)
    lines = [
        {"text": "t4 " * 5000 + "t6"},
        {"prompt": "t6 t9"},
        {"messages": [{"role": "user", "content": "t9 t9"}, {"role": "assistant", "content": "t9"}]},
    ]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    counts = counts_from_text(tmp_path / "text.jsonl", Target.open(target))
    assert {i: int(n) for i, n in enumerate(counts) if n} == {4: 5000, 6: 2, 7: 2, 9: 4}


def test_recorded_answers_outside_the_held_out_ones_choose_the_vocabulary(tmp_path):
    """Catches: held-out answers that choose the vocabulary by which they are measured, or a token counted once for each
    draft step."""
    source, _, ids = form("specforge", tmp_path / "source")
    hidden = torch.randn(20 * 12 * K, D, generator=torch.Generator().manual_seed(5))
    states = columns(hidden, torch.randn(TRUNCATED, D), ids)
    first, held_out = states["step"] == 0, states["doc"] % 5 == 0
    states["next_token"][:] = 8
    states["next_token"][first & ~held_out] = torch.tensor([20, 22, 22, 20, 24, 22]).repeat(32)
    states["next_token"][held_out] = 60
    write_head_states(tmp_path / "states", **states)
    options = Options(str(source), tmp_path / "out", vocab="3", head="dense", hidden_states=tmp_path / "states")
    checkpoint = convert(Options(**{**vars(options), "force": True})).checkpoint
    assert (checkpoint.load("d2t") + torch.arange(3)).tolist() == [20, 22, 24]


def test_distillation_of_a_truncated_head_uses_draft_ids(tmp_path, monkeypatch):
    """Catches: target ids taken for rows of a truncated head, or a traceback for states of a larger vocabulary."""
    source, head, ids = form("specforge", tmp_path / "source")
    hidden = torch.randn(20 * 12 * K, D, generator=torch.Generator().manual_seed(5))
    known = columns(hidden, head, ids)
    learned = []

    def spy(dense, factors, states, held_out, *rest):
        learned.extend([states, held_out])
        return factors

    monkeypatch.setattr(conversion, "distill", spy)
    states = write_head_states(tmp_path / "states", **known)
    options = Options(str(source), tmp_path / "out", rank=2, hidden_states=states, distill=Recipe(2), force=True)
    convert(options)
    assert len(learned) == 2
    for samples in learned:
        wanted = {tuple(h.tolist()): int(t) for h, t in zip(hidden, known["next_token"], strict=True)}
        for state, token in zip(samples.hidden, samples.token, strict=True):
            target = wanted[tuple(state.tolist())]
            assert (int(ids[token]) == target) if token >= 0 else target not in ids.tolist()
    known["next_token"][:] = 10**6
    larger = write_head_states(tmp_path / "larger", **known)
    with pytest.raises(CheckpointError, match="next_token has 1000000, and the drafter's vocab_size is"):
        convert(replace(options, output=tmp_path / "out2", hidden_states=larger))


def test_distillation_is_not_resumed_for_another_vocabulary_or_recipe(tmp_path):
    """Catches: half-distilled rows taken over for another vocabulary of the same size, or a distillation that runs half
    by one recipe and half by another."""
    source, _, ids = form("specforge", tmp_path / "source")
    states = write_head_states(tmp_path / "states")
    for name in ("a", "b", "a"):
        chosen = ids[:8] if name == "a" else ids[8:16]
        (tmp_path / "counts.json").write_text(json.dumps({str(int(i)): 1 for i in chosen}))
        options = Options(str(source), tmp_path / "out", rank=2, vocab="8", frequencies=tmp_path / "counts.json")
        convert(replace(options, hidden_states=states, distill=Recipe(2), force=True))
        options.output.rename(tmp_path / f"{name}{len(list(tmp_path.iterdir()))}")
    assert len(list(options.run.glob("distill-*.pt"))) == 2
    convert(replace(options, hidden_states=states, distill=Recipe(3), force=True))
    assert len(list(options.run.glob("distill-*.pt"))) == 3


def test_truncated_dense_drafter_is_written_for_comparison(tmp_path, full_head):
    """Catches: a truncated dense drafter that EAGLE's tools or vLLM read otherwise than it was measured."""
    source, head, ids = form("speculators", tmp_path / "source")
    (tmp_path / "counts.json").write_text(json.dumps({str(int(ids[i])): i for i in (5, 3, 60, 7)}))
    options = Options(
        str(source), tmp_path / "out", head="dense", vocab="4", frequencies=tmp_path / "counts.json", layout="slimspec"
    )
    done = convert(options)
    checkpoint = done.checkpoint
    keep = [3, 5, 7, 60]
    assert checkpoint.format == "eagle3"
    assert checkpoint.config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert checkpoint.config["draft_vocab_size"] == 4
    assert not any(key.startswith("lm_head") for key in checkpoint.config)
    assert {n for n in checkpoint.tensors if n.startswith("lm_head")} == {DENSE}
    assert torch.equal(checkpoint.load(DENSE), head[keep])
    assert torch.equal(checkpoint.load("d2t") + torch.arange(4), ids[keep])
    assert checkpoint.load("t2d").nonzero()[:, 0].tolist() == ids[keep].tolist()
    assert done.outcome.head_bytes == head[keep].nbytes
    assert "dense LM head for 4 of" in (tmp_path / "out" / "README.md").read_text()
    assert torch.equal(Drafter.open(tmp_path / "out").head, head[keep])


@pytest.mark.parametrize("head", ["dense", "low-rank"])
def test_truncated_head_is_measured_against_the_full_head(head, tmp_path):
    """Catches: a truncated head compared with itself, with which it always agrees."""
    source, dense, ids = form("specforge", tmp_path / "source")
    (tmp_path / "counts.json").write_text(json.dumps({str(int(i)): 1 for i in ids[:32]}))
    states = write_head_states(tmp_path / "states")
    options = Options(
        str(source),
        tmp_path / "out",
        head=head,
        rank=R if head == "low-rank" else None,
        vocab="32",
        frequencies=tmp_path / "counts.json",
        hidden_states=states,
        force=True,
    )
    done = convert(options)
    hidden = HeadStates.open(states).sample(True, 10**6).hidden
    scores = hidden @ dense.T
    kept = float((scores.argmax(-1) < 32).double().mean())
    quality = done.outcome.quality
    assert 0.2 < kept < 0.8
    assert quality.top1 == pytest.approx(kept)  # of rank R, the factors are exact
    assert done.outcome.loss == pytest.approx(1 - kept)
    p, q = scores.softmax(-1)[:, :32], scores[:, :32].softmax(-1)
    assert quality.overlap == pytest.approx(float(torch.minimum(p, q).sum(-1).mean()), rel=1e-3)
    assert quality.kl is None
    with pytest.raises(CheckpointError, match=r"larger --vocab|--distill-steps"):
        convert(Options(**{**vars(options), "force": False, "output": tmp_path / "refused"}))


def test_rerank_stores_the_rows_unless_they_are_the_targets(tmp_path, full_head):
    """Catches: a gigabyte of rows written for nothing, or the target's rows named where the drafter's differ from
    them."""
    target = write_target(tmp_path / "target", full_head)
    own, head, _ = form("specforge", tmp_path / "own")
    shared, _, _ = form("no-head", tmp_path / "shared")
    states = write_head_states(tmp_path / "states")
    first, second = (
        convert(Options(str(s), tmp_path / o, str(target), rank=2, rerank=8, hidden_states=states, force=True))
        for s, o in ((own, "a"), (shared, "b"))
    )
    assert torch.equal(first.checkpoint.load(DENSE), head)
    assert first.checkpoint.config["lm_head_rerank"] == 8
    assert "lm_head_rerank_rows" not in first.checkpoint.config
    assert DENSE not in second.checkpoint.tensors
    assert second.checkpoint.config["lm_head_rerank_rows"] == "target"


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_quantized_head_is_measured_as_it_is_written(kind, tmp_path):
    """Catches: a quantized factor that is measured in floats, and not as it is written."""
    source, _, _ = form("specforge", tmp_path / "source")
    states = write_head_states(tmp_path / "states")
    done = convert(Options(str(source), tmp_path / "out", rank=R, quantize=kind, hidden_states=states, force=True))
    assert done.checkpoint.spec.quantization == kind
    assert {"fp8": 0.8, "int8": 0.95, "int4": 0.5}[kind] < done.evaluation.heads["low-rank"].top1 < 1


@pytest.fixture
def lossy(tmp_path):
    """A dense drafter with a head of full rank, and states of its target: a low rank loses much of its acceptance."""
    torch.manual_seed(0)
    tensors = drafters.dense(drafters.tensors(TRUNCATED)) | {DENSE: torch.randn(TRUNCATED, D)}
    ids = tensors["d2t"] + torch.arange(TRUNCATED)
    config = drafters.config(architectures=["LlamaForCausalLMEagle3"], draft_vocab_size=TRUNCATED, lm_head_rank=None)
    hidden = torch.randn(20 * 12 * K, D, generator=torch.Generator().manual_seed(5))
    states = write_head_states(tmp_path / "states", **columns(hidden, tensors[DENSE], ids))
    return drafters.write(tmp_path / "lossy", config, tensors), states


def test_conversion_that_loses_too_much_is_refused_with_a_cure(lossy, tmp_path):
    """Catches: a drafter written that accepts too little to be of use, or an error whose advice does not work."""
    source, states = lossy
    options = Options(str(source), tmp_path / "out", rank=24, hidden_states=states)
    words = r"loses \d+.\d% \(\d+.\d% to \d+.\d%\) of acceptance length.*--rerank 8 loses \d"
    with pytest.raises(CheckpointError, match=words) as error:
        convert(options)
    assert "\n" not in str(error.value)
    assert not options.output.exists()
    done = convert(Options(**{**vars(options), "rerank": 8}))
    assert done.outcome.loss < 0.03
    forced = convert(Options(**{**vars(options), "output": tmp_path / "forced", "force": True}))
    assert forced.outcome.loss > 0.03


def test_only_states_of_another_drafter_are_warned_of(lossy, tmp_path, caplog):
    """Catches: figures measured on the states of another drafter of the same width without a warning, or a warning
    about its own states."""
    source, states = lossy
    index = {"format": 1, "K": K, "drafter": "other", "drafter_fingerprint": fingerprint(source)}
    for mine in (True, False):
        caplog.clear()
        (states / "index.json").write_text(json.dumps(index))
        options = Options(str(source), tmp_path / f"{mine}", rank=24, hidden_states=states, force=True)
        convert(options)
        assert ("recorded with another drafter (other)" in caplog.text) != mine
        index["drafter_fingerprint"] = "0"


def test_held_out_documents_are_cut_only_where_measuring_is_costly(lossy, tmp_path, monkeypatch):
    """Catches: a head judged by a few documents where all could be used, or hours of measuring where the head is
    large."""
    source, states = lossy
    monkeypatch.setattr(conversion, "_HELD_OUT_STATES", 50)
    work = Conversion.open(Options(str(source), tmp_path / "out", hidden_states=states))
    assert len(work._held_out.doc.unique()) == 4  # of 20
    monkeypatch.setattr(conversion, "_OPERATIONS", {"cpu": 0, "cuda": 0})
    assert len(Conversion.open(work.options)._held_out.doc.unique()) == 1


def test_sweep_is_sorted_and_names_the_fastest_head(lossy, tmp_path, full_head):
    """Catches: a sweep table in another order than of speed, or a lower rank that is not the best of its rank."""
    source, states = lossy
    target = write_target(tmp_path / "target", full_head)
    evaluation, outcomes = sweep(Options(str(source), tmp_path / "out", str(target), hidden_states=states), [8, 2, 4])
    assert [o.speedup for o in outcomes] == sorted((o.speedup for o in outcomes), reverse=True)
    plain = {o.rank: o.quality.top1 for o in outcomes if o.rerank is None}
    assert plain[32] > plain[16] > plain[8]
    alone = convert(Options(str(source), tmp_path / "out", str(target), rank=8, hidden_states=states, force=True))
    assert evaluation.heads["8"].top1 == pytest.approx(alone.outcome.quality.top1, abs=0.02)


def test_predicted_speedup_follows_the_papers_equation(lossy, tmp_path, full_head):
    """Catches: kappa or nu turned upside down in the predicted speedup, or bytes of another head or body in it."""
    source, states = lossy
    target = write_target(tmp_path / "target", full_head)
    _, outcomes = sweep(Options(str(source), tmp_path / "out", str(target), hidden_states=states), [8, 2])
    others = Target.open(target).nbytes(K) + K * Drafter.open(source).body_bytes
    dense_bytes, row_bytes = 4 * TRUNCATED * D, 4 * D
    for o in outcomes:
        head_bytes = 4 * o.rank * (TRUNCATED + D) + (o.rerank or 0) * row_bytes
        before, after = others + K * dense_bytes, others + K * head_bytes
        assert (o.dense_bytes, o.head_bytes) == (dense_bytes, head_bytes)
        assert o.speedup == pytest.approx(o.quality.of_dense.value * before / after)


def test_sweep_of_trained_factors_factorizes_again_at_each_rank(tmp_path):
    """Catches: the first rows of trained factors, which have no order, taken for the best ones of a lower rank."""
    torch.manual_seed(0)
    tensors, config = drafters.tensors(rank=16), drafters.config(lm_head_rank=16)
    tensors[DOWN] *= torch.logspace(-3, 0, 16)[:, None]  # the largest come last
    source = drafters.write(tmp_path / "source", config, tensors)
    states = write_head_states(tmp_path / "states")
    evaluation, _ = sweep(Options(str(source), tmp_path / "out", hidden_states=states), [4, 8])
    assert evaluation.heads["16"].top1 == 1.0
    assert evaluation.heads["8"].top1 > 0.8


def test_plot_shows_the_measured_heads(lossy, tmp_path, full_head):
    """Catches: a line drawn through the wrong heads, ranks out of order, a share drawn as percent, or a file that is no
    PNG."""
    source, states = lossy
    options = Options(str(source), tmp_path / "out", hidden_states=states)
    _, outcomes = sweep(options, [8, 2, 4])
    (axes,) = sweep_figure(outcomes).axes
    lines = {line.get_label(): [tuple(point) for point in line.get_xydata()] for line in axes.lines}
    assert {"low-rank", "re-rank 8", "re-rank 16", "re-rank 64"} <= lines.keys()
    for label, points in lines.items():
        k = None if label == "low-rank" else int(str(label).removeprefix("re-rank "))
        expected = {o.rank: 100 * o.loss for o in outcomes if o.rerank == k}
        assert [rank for rank, _ in points] == [8, 16, 32]
        assert dict(points) == pytest.approx(expected)
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    arguments = [str(source), "--hidden-states", str(states), "--output-path", str(tmp_path / "out"), "--sweep", "8,4"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    picture = (tmp_path / "out.sweep.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 10_000


def test_conversion_keeps_the_width_of_a_wider_target(tmp_path):
    """Catches: the target's width taken for the drafter's, in any step of converting a drafter that is narrower than
    its target."""
    source, head, _ = form("specforge", tmp_path / "narrow")
    checkpoint = DraftCheckpoint.open(source)
    tensors = {n: checkpoint.load(n) for n in checkpoint.tensors} | _of_a_target(96)
    source = drafters.write(tmp_path / "source", checkpoint.config | {"target_hidden_size": 96}, tensors)
    target = write_target(tmp_path / "target", torch.randn(V, 96), hidden_size=96)
    states = write_head_states(tmp_path / "states")
    options = Options(str(source), tmp_path / "out", str(target), rank=R, rerank=8, hidden_states=states)
    done = convert(replace(options, layout="speculators"))
    assert done.checkpoint.flat["target_hidden_size"] == 96
    assert torch.equal(done.checkpoint.load(DENSE), head)
    assert done.outcome.quality.top1 == 1.0


def test_speculators_config_names_its_target_by_an_absolute_path(tmp_path, full_head, monkeypatch):
    """Catches: a server that looks for ./target in its own working folder, or a model card whose link or command works
    in one folder only."""
    source, _, _ = form("specforge", tmp_path / "source")
    target = write_target(tmp_path / "a folder", full_head)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["slimspec", "convert", "--target", "a folder"])
    done = convert(Options(str(source), Path("out"), "a folder", rank=R, layout="speculators"))
    assert done.checkpoint.config["speculators_config"]["verifier"]["name_or_path"] == str(target)
    card = Path("out", "README.md").read_text()
    assert "slimspec convert --target 'a folder'" in card
    assert "base_model" not in card
    monkeypatch.setattr("vllm_slimspec.target.fetch", lambda name, _: target if name == "org/t" else Path(name))
    convert(Options(str(source), Path("hub"), "org/t", rank=R))
    assert "\nbase_model: org/t\n" in Path("hub", "README.md").read_text()


def test_model_card_states_what_the_provenance_measured(lossy, tmp_path, full_head):
    """Catches: a model card that says something else than the checkpoint it lies beside."""
    source, states = lossy
    target = write_target(tmp_path / "target", full_head)
    convert(Options(str(source), tmp_path / "out", str(target), rank=24, rerank=32, hidden_states=states))
    card = (tmp_path / "out" / "README.md").read_text()
    provenance = json.loads((tmp_path / "out" / "slimspec.json").read_text())
    measured = provenance["measured"]
    assert f"rank 24 of {D}, {TRUNCATED} tokens, the best 32 scored again" in card
    assert f"{measured['quality']['tau']['value']:.2f} (95%:" in card
    assert f"{measured['quality']['of_dense']['value']:.1%} (95%:" in card
    assert f"vllm serve {target}" in card
    assert provenance["source"]["drafter_sha256s"]
    assert {"vllm-slimspec", "torch"} <= provenance["versions"].keys()


def test_drafter_from_the_hub_is_downloaded_without_pickles(tmp_path, monkeypatch):
    """Catches: pickled weights downloaded from the hub, or a traceback of the hub's client."""
    source, head, _ = form("specforge", tmp_path / "source")
    asked = []

    def download(name, allow_patterns, revision=None):
        asked.append((name, allow_patterns))
        if name == "org/gone":
            raise OSError("Repository Not Found\nsee the log")
        return str(pickled if name == "org/pickled" else source)

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((source / "config.json").read_text())
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert torch.equal(Drafter.open("org/drafter").head, head)
    assert asked == [("org/drafter", ["*.json", "*.safetensors"])]
    with pytest.raises(
        CheckpointError, match=r"^org/pickled: has no safetensors.* hf download org/pickled --local-dir"
    ):
        Drafter.open("org/pickled")
    with pytest.raises(CheckpointError, match=r"^org/gone: no such folder, .*: Repository Not Found$"):
        Drafter.open("org/gone")


def _nan(folder: Path) -> Path:
    hidden = torch.randn(100, D)
    hidden[40, 3] = torch.nan
    folder.mkdir()
    save_file({"hidden": hidden}, folder / "states-00000.safetensors")
    (folder / "index.json").write_text('{"format": 1}')
    return folder


def _bad(case: str, folder: Path) -> list[str]:
    """Return the arguments of a command with one mistake."""
    full = torch.randn(V, D)
    good, _, _ = form("specforge", folder / "good")
    target = str(write_target(folder / "target", full))
    counts = str(folder / "counts.json")
    (folder / "counts.json").write_text("{}")
    match case:
        case "target for a drafter":
            return [target]
        case "pickle":
            (folder / "pickle").mkdir()
            (folder / "pickle" / "config.json").write_text((good / "config.json").read_text())
            torch.save({}, folder / "pickle" / "pytorch_model.bin")
            return [str(folder / "pickle")]
        case "other hidden size":
            return [str(good), "--target", str(write_target(folder / "t", full[:, :32], hidden_size=32))]
        case "other vocabulary":
            return [str(good), "--target", str(write_target(folder / "t", full[:100], vocab_size=100))]
        case "other tokenizer":
            for place, token in ((good, "a"), (folder / "target", "b")):
                (place / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {token: 0}}}))
            return [str(good), "--target", target]
        case "huge tokenizer":
            with (good / "tokenizer.json").open("wb") as file:
                file.truncate(65 << 20)  # of holes
            return [str(good), "--target", target]
        case "no tokenizer":
            (good / "tokenizer.json").write_text("[]")
            return [str(good), "--target", target]
        case "no target for a drafter without a head":
            return [str(form("no-head", folder / "headless")[0])]
        case "two devices":
            engine = ["--engine-args", '{"tensor_parallel_size": 2}']
            return [str(good), "--target", target, "--calibration", "p.jsonl", *engine]
        case "empty prompts":
            (folder / "p.jsonl").write_text("\n\n")
            return [str(good), "--target", target, "--calibration", str(folder / "p.jsonl")]
        case "malformed prompts":
            (folder / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": ')
            return [str(good), "--target", target, "--calibration", str(folder / "p.jsonl")]
        case "long prompts":
            LlamaConfig(vocab_size=V, hidden_size=D, max_position_embeddings=300).save_pretrained(folder / "target")
            (folder / "p.jsonl").write_text(json.dumps({"input_ids": [1] * 40}) + "\n" + '{"input_ids": [1]}')
            return [str(good), "--target", target, "--calibration", str(folder / "p.jsonl")]
        case "no states":
            (folder / "s").mkdir()
            return [str(good), "--hidden-states", str(folder / "s")]
        case "states of another size":
            return [str(good), "--hidden-states", str(write_head_states(folder / "s", hidden_size=32))]
        case "NaN states":
            return [str(good), "--hidden-states", str(_nan(folder / "s"))]
        case "rank before calibration":
            return [str(good), "--target", target, "--calibration", "none.jsonl", "--rank", "65"]
        case "sweep before calibration":
            return [str(good), "--target", target, "--calibration", "none.jsonl", "--sweep", "8,65"]
        case "vocab before calibration":
            return [str(good), "--target", target, "--calibration", "none.jsonl", "--vocab", "some"]
        case "more candidates than tokens":
            return [str(good), "--vocab", "12", "--rerank", "16", "--frequencies", counts]
        case "rank":
            return [str(good), "--rank", "65"]
        case "vocab":
            return [str(good), "--vocab", "some"]
        case "more tokens than rows":
            return [str(good), "--vocab", "65", "--frequencies", counts]
        case "fewer tokens than begin and end a text":
            (folder / "target" / "generation_config.json").write_text('{"eos_token_id": [2, 4]}')
            return [str(good), "--target", target, "--vocab", "1", "--frequencies", counts]
        case "nothing to count by":
            return [str(good), "--vocab", "8"]
        case "counts of another vocabulary":
            (folder / "counts.json").write_text('{"128": 3}')
            return [str(good), "--vocab", "8", "--frequencies", counts]
        case "negative count":
            (folder / "counts.json").write_text('{"12": -3}')
            return [str(good), "--vocab", "8", "--frequencies", counts]
        case "counts that are no object":
            (folder / "counts.json").write_text("[1, 2]")
            return [str(good), "--vocab", "8", "--frequencies", counts]
        case "text of another vocabulary":
            (folder / "p.jsonl").write_text('{"input_ids": [1]}\n{"input_ids": [1, 128]}')
            return [str(good), "--target", target, "--vocab", "8", "--prompts", str(folder / "p.jsonl")]
        case "text without a tokenizer":
            (folder / "p.jsonl").write_text('{"text": "x"}')
            return [str(good), "--target", target, "--vocab", "8", "--prompts", str(folder / "p.jsonl")]
        case "two counts":
            return [str(good), "--vocab", "8", "--prompts", "p.jsonl", "--frequencies", counts]
        case "counts for nothing":
            return [str(good), "--frequencies", counts]
        case "sweep of what is not swept":
            return [str(good), "--sweep", "8,4", "--rerank", "8"]
        case "rank of a dense head":
            return [str(good), "--head", "dense", "--rank", "8"]
        case "distill without states":
            return [str(good), "--distill-steps", "5"]
        case "taken":
            (folder / "out").mkdir()
            (folder / "out" / "mine").write_text("x")
            return [str(good)]
    raise AssertionError(case)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("target for a drafter", "not an EAGLE-3 drafter"),
        ("pickle", "pickle checkpoint can run code"),
        ("other hidden size", "made for a target of hidden size 64"),
        ("other vocabulary", "vocab_size=128 but"),
        ("other tokenizer", "tokenizer is not that of"),
        ("huge tokenizer", "tokenizer.json: 68157440 bytes, at most 67108864 are read"),
        ("no tokenizer", "tokenizer.json: describes no tokenizer"),
        ("no target for a drafter without a head", "give --target"),
        ("two devices", "tensor_parallel_size=2: head states are recorded in one process"),
        ("empty prompts", "holds no prompt"),
        ("malformed prompts", "p.jsonl:2: not a prompt"),
        ("long prompts", "p.jsonl:1: the prompt has 40 tokens, 1 to 34 fit"),
        ("no states", "index.json: no such file"),
        ("states of another size", "states have 32 numbers"),
        ("NaN states", "row 40 holds NaN"),
        ("rank before calibration", "rank 65 does not fit"),
        ("sweep before calibration", "rank 0 does not fit"),
        ("vocab before calibration", "must be keep, full or a number"),
        ("more candidates than tokens", "--rerank 16: the factors score 12 tokens"),
        ("rank", "rank 65 does not fit"),
        ("vocab", "must be keep, full or a number"),
        ("more tokens than rows", "number of tokens from 1 to 64"),
        ("fewer tokens than begin and end a text", "number of tokens from 2 to 64"),
        ("nothing to count by", "give --frequencies, --prompts"),
        ("counts of another vocabulary", "token 128 with count 3"),
        ("negative count", "token 12 with count -3"),
        ("counts that are no object", "must be a JSON object"),
        ("text of another vocabulary", "p.jsonl:2: token ids are 0 to 127"),
        ("text without a tokenizer", "no tokenizer to read the prompts with"),
        ("two counts", "give one"),
        ("counts for nothing", "belong to --vocab N"),
        ("sweep of what is not swept", "leave out --distill-steps"),
        ("rank of a dense head", "--head dense has no factors"),
        ("distill without states", "need states to learn from"),
        ("taken", "not an empty folder"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(case, message, tmp_path, monkeypatch):
    """Catches: a traceback, a wrong exit code, half a drafter, or an engine that starts before the prompts are read."""
    monkeypatch.setattr("vllm_slimspec.engine.recording._engine", lambda *_: pytest.fail("an engine was started"))
    # On a busy machine its first import takes longer than progress stays silent.
    importlib.import_module("vllm.engine.arg_utils")
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    arguments = _bad(case, tmp_path)
    before = sorted(p for p in tmp_path.rglob("*"))
    result = CliRunner().invoke(app, [*arguments, "--output-path", str(tmp_path / "out")])
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_convert_command_passes_its_flags_on_and_prints_the_sweep(lossy, tmp_path, full_head):
    """Catches: flags of `slimspec convert` that do not arrive, or tables that cannot be printed."""
    source, states = lossy
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    target = write_target(tmp_path / "target", full_head)
    common = [str(source), "--verifier", str(target), "--hidden-states", str(states)]
    swept = CliRunner().invoke(app, [*common, "--output-path", str(tmp_path / "out"), "--sweep", "4,2"])
    assert swept.exit_code == 0, swept.output
    assert "rerank" in swept.stdout
    _, outcomes = sweep(Options(str(source), tmp_path / "out", str(target), hidden_states=states), [4, 2])
    best = max(outcomes, key=lambda o: o.speedup)
    again = f" with --rerank {best.rerank}" if best.rerank else ""
    assert f"best predicted speed: --rank {best.rank}{again}, {best.speedup:.2f}x" in swept.stdout
    assert not (tmp_path / "out").exists()
    flags = ["--rank", "24", "--rerank", "16", "--quantize", "int8", "--distill-steps", "3", "--loss", "nla"]
    written = CliRunner().invoke(app, [*common, "--output-path", str(tmp_path / "out"), *flags])
    assert written.exit_code == 0, written.output
    spec = DraftCheckpoint.open(tmp_path / "out").spec
    assert (spec.rank, spec.rerank, spec.quantization) == (24, 16, "int8")
    for wrong in (["--sweep", "a"], ["--engine-args", "["], ["--loss", "mse"]):
        assert CliRunner().invoke(app, [*common, "--output-path", "x", *wrong]).exit_code == 2
