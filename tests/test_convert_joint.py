"""Joint distillation: the real trainer starts from the converted drafter, and returns the same drafter, trained."""

from dataclasses import replace

import drafters
import pytest
import torch
from drafters import D, R, V
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from vllm_slimspec.convert.distill import Recipe
from vllm_slimspec.convert.options import Options
from vllm_slimspec.convert.run import convert
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.drafters.source import Drafter
from vllm_slimspec.engine.head_states import Document, HeadStates, Rows, StatesWriter, common, concatenate
from vllm_slimspec.errors import CheckpointError, OptionError
from vllm_slimspec.joint import JointRecipe
from vllm_slimspec.train.launch import SlimSpecTrainer
from vllm_slimspec.train.states import write_states

K, DOCUMENTS = 3, 20
DRAFT_V = V // 2
FLAGS = {"total_seq_len": 64, "hidden_states_dtype": "float32", "optimizer": "adamw", "checkpoint_freq": 1.0}
RECIPE = JointRecipe(steps=4, lr=1e-2, flags=FLAGS)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("target")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def answers() -> list[Document]:
    generator = torch.Generator().manual_seed(0)
    return [Document(i, torch.randint(V, (30,), generator=generator).tolist(), 10) for i in range(DOCUMENTS)]


def states_of(folder, documents, hidden_seed=0) -> HeadStates:
    """Write random states for every place of these documents."""
    writer = StatesWriter(folder, {"K": K})
    for group, document in enumerate(documents):
        starts = torch.arange(document.prompt + 1, len(document.tokens) - K + 1)
        step = torch.arange(K).repeat(len(starts))
        pos = starts.repeat_interleave(K) + step
        hidden = torch.randn(len(pos), D, generator=torch.Generator().manual_seed(hidden_seed + document.number))
        doc = torch.full_like(pos, document.number)
        writer.write(group, Rows(hidden, doc, step, pos, torch.tensor(document.tokens)[pos]), [document])
    return writer.finish()


@pytest.fixture
def states(tmp_path):
    return states_of(tmp_path / "states", answers())


@pytest.fixture
def started(monkeypatch):
    """The weights from which each training starts."""
    seen = []
    original = SlimSpecTrainer.setup_optimizer

    def setup_optimizer(self):
        original(self)
        seen.append({name: t.clone() for name, t in self.model.state_dict().items()})

    monkeypatch.setattr(SlimSpecTrainer, "setup_optimizer", setup_optimizer)
    return seen


def dense_drafter(folder, **config):
    tensors = drafters.dense(drafters.tensors(DRAFT_V))
    settings = {"lm_head_rank": None, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": DRAFT_V}
    return drafters.write(folder, drafters.config(**settings | config), tensors)


def factors(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(R, D, generator=generator), torch.randn(DRAFT_V, R, generator=generator)


def renamed(name: str) -> str:
    return name.replace("midlayer.", "layers.0.")


def test_joint_training_starts_from_the_converted_drafter(target, states, tmp_path, started):
    """Catches: a body, a head or a map that is initialized anew or does not learn, or a run without its last steps."""
    source = Drafter.open(dense_drafter(tmp_path / "source"))
    down, up = factors()
    trained = RECIPE.train(source, (down, up), str(target), states, tmp_path / "run")

    (start,) = started
    expected = {renamed(name): t for name, t in source.body_tensors()} | {"d2t": source.d2t}
    expected |= {"lm_head.down.weight": down, "lm_head.up.weight": up}
    for name, tensor in expected.items():
        torch.testing.assert_close(start[name], tensor, rtol=0, atol=0)
    assert torch.equal(start["t2d"].nonzero()[:, 0], source.ids)
    model = AutoModelForCausalLM.from_pretrained(target)
    rows = model.lm_head.weight[source.ids].detach()
    torch.testing.assert_close(start["verifier_lm_head.weight"], rows, rtol=0, atol=0)
    embeddings = model.get_input_embeddings().weight.detach()
    torch.testing.assert_close(start["embed_tokens.weight"], embeddings, rtol=0, atol=0)

    after = {renamed(name): t for name, t in trained.body_tensors()}
    assert after.keys() == {renamed(name) for name in source.body}
    assert [name for name in after if torch.equal(after[name], start[name])] == []
    assert not torch.equal(trained.factors[0], down)
    assert not torch.equal(trained.factors[1], up)
    assert torch.equal(trained.d2t, source.d2t)
    assert trained.config == source.config
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["drafter"]


def test_drafters_own_embeddings_are_kept(target, states, tmp_path, started):
    """Catches: the drafter's own embeddings replaced by the target's, in training or in the written folder."""
    folder, own = dense_drafter(tmp_path / "source"), torch.randn(V, D)
    checkpoint = DraftCheckpoint.open(folder)
    tensors = {name: checkpoint.load(name) for name in checkpoint.tensors} | {"embed_tokens.weight": own}
    source = Drafter.open(drafters.write(tmp_path / "own", checkpoint.config, tensors))
    trained = replace(RECIPE, steps=1).train(source, factors(), str(target), states, tmp_path / "run")
    assert torch.equal(started[0]["embed_tokens.weight"], own)
    assert torch.equal(dict(trained.body_tensors())["embed_tokens.weight"], own)


@pytest.fixture
def steps(monkeypatch):
    """The first and the last step of each training, and how many steps an epoch has."""
    seen = []
    original = SlimSpecTrainer.run_training

    def run_training(self):
        first = self.global_step
        original(self)
        seen.append((first, self.global_step, len(self.train_loader)))

    monkeypatch.setattr(SlimSpecTrainer, "run_training", run_training)
    return seen


def test_joint_training_takes_exactly_the_given_steps(target, states, tmp_path, steps):
    """Catches: speculators stopping an epoch at the last step and then taking one more step in every other epoch."""
    source = Drafter.open(dense_drafter(tmp_path / "source"))
    for wanted in (2, 11):
        replace(RECIPE, steps=wanted).train(source, factors(), str(target), states, tmp_path / f"{wanted}")
    assert [done for _, done, _ in steps] == [2, 11]
    assert 2 < steps[0][2] < 11  # less than an epoch, and more than one


def test_joint_training_does_not_learn_held_out_answers(target, states, tmp_path, monkeypatch):
    """Catches: a drafter measured on answers that it was trained on."""
    from vllm_slimspec.train import states as module

    seen = []
    monkeypatch.setattr(module, "write_states", lambda _, documents, *args, **kwargs: seen.extend(documents))
    monkeypatch.setattr("vllm_slimspec.train.launch.fit", lambda *args, **kwargs: None)
    source = Drafter.open(dense_drafter(tmp_path / "source"))
    with pytest.raises(CheckpointError, match="no such folder"):  # nothing was trained
        RECIPE.train(source, factors(), str(target), states, tmp_path / "run")
    assert seen == [d for d in answers() if d.number % 5]


def test_joint_training_learns_from_the_given_documents_only(target, states, tmp_path, steps):
    """Catches: recorded answers learned although other documents were given, states of layers that the drafter does not
    read, or a user's states removed with the run's own files."""
    source = Drafter.open(dense_drafter(tmp_path / "source"))
    documents = answers() * 3
    for name, layers in (("data", [1, 2, 3]), ("others", [0, 1, 2])):
        write_states(target, documents, tmp_path / name, layer_ids=layers)
    recipe = replace(RECIPE, steps=1, data=tmp_path / "data")
    recipe.train(source, factors(), str(target), states, tmp_path / "run")
    assert steps[0][2] > 20  # steps an epoch: of 7 with the recorded answers
    assert (tmp_path / "data" / "states.json").exists()
    with pytest.raises(CheckpointError, match=r"layers \[0, 1, 2\], but this drafter reads layers \[1, 2, 3\]"):
        replace(recipe, data=tmp_path / "others").train(source, factors(), str(target), states, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_interrupted_joint_training_is_resumed(target, states, tmp_path, monkeypatch, steps):
    """Catches: a body trained twice over or from the beginning again, or finished work that is done again."""
    source = Drafter.open(dense_drafter(tmp_path / "source"))
    recipe = replace(RECIPE, steps=9, flags=FLAGS | {"checkpoint_freq": 0.5})
    whole = recipe.train(source, factors(), str(target), states, tmp_path / "whole")
    original, saved = SlimSpecTrainer.maybe_save_checkpoint, []

    def killed(self, epoch, local_step=0):
        original(self, epoch, local_step)
        saved.append(self.global_step)
        raise RuntimeError("killed")

    monkeypatch.setattr(SlimSpecTrainer, "maybe_save_checkpoint", killed)
    with pytest.raises(RuntimeError, match="killed"):
        recipe.train(source, factors(), str(target), states, tmp_path / "run")
    monkeypatch.setattr(SlimSpecTrainer, "maybe_save_checkpoint", original)
    again = recipe.train(source, factors(), str(target), states, tmp_path / "run")
    assert [s[:2] for s in steps] == [(0, 9), (saved[0], 9)]
    assert 0 < saved[0] < 7  # inside of the first epoch
    for name, tensor in dict(whole.body_tensors()).items():
        torch.testing.assert_close(dict(again.body_tensors())[name], tensor, rtol=1e-4, atol=1e-5)
    recipe.train(source, factors(), str(target), states, tmp_path / "run")
    assert len(steps) == 2


def test_body_that_speculators_cannot_train_is_refused_early(target, states, tmp_path):
    """Catches: a tensor left at random because speculators names or shapes it otherwise, or a refusal only after
    gigabytes were written."""
    config, tensors = drafters.config(lm_head_rank=None, architectures=["LlamaForCausalLMEagle3"]), drafters.tensors()
    tensors = drafters.dense(tensors)
    fused = [tensors.pop(f"midlayer.self_attn.{name}_proj.weight") for name in "qkv"]
    tensors["midlayer.self_attn.qkv_proj.weight"] = torch.cat(fused)
    source = Drafter.open(drafters.write(tmp_path / "source", config, tensors))
    given = torch.randn(R, D), torch.randn(V, R)
    with pytest.raises(CheckpointError, match=r"k_proj.weight is missing, but .*--distill-steps"):
        RECIPE.train(source, given, str(target), states, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_drafts_of_two_recordings_are_compared_at_common_places_only(tmp_path):
    """Catches: a draft compared with that of another place, because one of the two recordings lacks a place."""
    one, other = (torch.tensor(keys) for keys in ([3, 1, 2, 7], [7, 5, 3, 1]))
    rows = [Rows(k[:, None].float(), k // 4, k % 2, k, k) for k in (one, other)]
    a, b = common(*rows)
    assert a.pos.tolist() == b.pos.tolist() == [1, 3, 7]
    assert a.hidden[:, 0].tolist() == b.hidden[:, 0].tolist() == [1, 3, 7]


def test_jointly_trained_drafter_is_measured_on_its_own_states(target, states, tmp_path, monkeypatch):
    """Catches: a trained head measured on states of the old body, a body that is measured and not written, or a model
    card about the old one."""
    recorded = []

    def collect_again(name, drafter, documents, folder, *, k, engine, dtype):
        recorded.append((str(name), [d.number for d in documents], k, engine))
        return states_of(folder, documents, hidden_seed=100)

    monkeypatch.setattr("vllm_slimspec.engine.recording.collect_again", collect_again)
    options = Options(
        str(dense_drafter(tmp_path / "source")),
        tmp_path / "out",
        str(target),
        rank=R,
        hidden_states=states.path,
        joint=RECIPE,
        force=True,
        engine={"max_model_len": 64},
    )
    done = convert(options)
    assert recorded == [(str(target), [0, 5, 10, 15], K, {"max_model_len": 64})]
    trained = next((tmp_path / "out.run").glob("joint-*/drafter"))
    expected = Drafter.open(trained)
    for name, tensor in expected.body_tensors():
        assert torch.equal(done.checkpoint.load(name), tensor)
    down, up = done.checkpoint.load("lm_head.down.weight"), done.checkpoint.load("lm_head.up.weight")
    assert torch.equal(up, expected.factors[1])
    moved = states_of(tmp_path / "moved", [d for d in answers() if d.number % 5 == 0], hidden_seed=100)
    old, new = (next(iter(s.read(held_out=True))).hidden for s in (states, moved))
    assert not torch.equal(old, new)
    drafted = concatenate(list(moved.read(held_out=True))).hidden @ down.T @ up.T
    dense = concatenate(list(states.read(held_out=True))).hidden @ Drafter.open(options.drafter).head.T
    same = float((drafted.argmax(-1) == dense.argmax(-1)).double().mean())
    assert done.outcome.quality.top1 == pytest.approx(same)
    assert done.checkpoint.config["draft_vocab_size"] == DRAFT_V


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rerank": 8}, "leave one of the two out"),
        ({"target": None}, "give --target"),
        ({"hidden_states": None}, "need states to learn from"),
    ],
)
def test_joint_training_without_what_it_needs_is_refused_first(changes, message, target, states, tmp_path):
    """Catches: hours of training before the command finds that an input is missing."""
    options = Options(
        str(dense_drafter(tmp_path / "source")), tmp_path / "out", str(target), hidden_states=states.path, joint=RECIPE
    )
    with pytest.raises(OptionError, match=message):
        convert(replace(options, **changes))


def test_joint_training_on_states_without_answers_is_refused(target, tmp_path):
    """Catches: a KeyError deep in the reader, after the head was distilled for an hour."""
    (tmp_path / "s").mkdir()
    save_file({"hidden": torch.randn(3000, D)}, tmp_path / "s" / "states-00000.safetensors")
    (tmp_path / "s" / "index.json").write_text('{"format": 1}')
    source = str(dense_drafter(tmp_path / "source"))
    options = Options(source, tmp_path / "out", str(target), hidden_states=tmp_path / "s", joint=RECIPE)
    with pytest.raises(CheckpointError, match="the answers are not beside the states"):
        convert(replace(options, distill=Recipe(3)))
    assert not options.run.exists()
