"""Which drafter folders are accepted, and the one line of error for each wrong one."""

import json
import os
from pathlib import Path

import drafters
import pytest
import torch
from drafters import D, R, V
from typer.testing import CliRunner

from vllm_slimspec.cli import app
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint, write_checkpoint
from vllm_slimspec.drafters.config import flatten, is_low_rank
from vllm_slimspec.errors import CheckpointError, OutputError
from vllm_slimspec.head.checks import count_not_finite
from vllm_slimspec.head.spec import DENSE, DOWN, FREQUENT, IDS, SCALE, TAIL_BIAS, TAIL_ROW, UP, head_spec


def _open(folder: Path) -> DraftCheckpoint:
    checkpoint = DraftCheckpoint.open(folder)
    checkpoint.check_values()
    return checkpoint


class TestAccepted:
    def test_slimspec_folder_is_described_with_its_sizes(self, tmp_path):
        """Catches: rank or vocabulary of our own format read from the wrong key."""
        spec = _open(drafters.write(tmp_path / "d", drafters.config(), drafters.tensors())).spec
        assert (spec.hidden_size, spec.rank, spec.draft_vocab_size) == (D, R, V)
        assert not spec.truncated
        assert spec.bytes(4) == 4 * R * (D + V)

    def test_torchspec_folder_is_described_as_low_rank(self, tmp_path):
        """Catches: TorchSpec's folder (stock architecture, a rank divisor, no draft_vocab_size) taken for a dense
        drafter."""
        config = drafters.config(
            architectures=["LlamaForCausalLMEagle3"], lm_head_rank=None, lm_head_rank_divisor=8, draft_vocab_size=None
        )
        checkpoint = _open(drafters.write(tmp_path / "d", config, drafters.tensors()))
        assert checkpoint.format == "torchspec"
        assert checkpoint.spec.rank == D // 8

    def test_rank_divisor_that_does_not_divide_rounds_down(self, tmp_path):
        """Catches: a rank that is rounded up where TorchSpec rounds down (64 // 9 = 7)."""
        config = drafters.config(lm_head_rank=None, lm_head_rank_divisor=9)
        assert _open(drafters.write(tmp_path / "d", config, drafters.tensors(rank=7))).spec.rank == 7

    def test_truncated_drafter_is_described_and_its_map_is_checked(self, tmp_path):
        """Catches: a truncated drafter opened without a look at its vocabulary map."""
        checkpoint = _open(drafters.write(tmp_path / "d", drafters.config(draft_vocab_size=32), drafters.tensors(32)))
        assert checkpoint.spec.truncated

    def test_all_zero_map_of_a_full_vocabulary_is_accepted(self, tmp_path):
        """Catches: SpecForge's all-zero d2t of a full vocabulary refused as a wrong map."""
        tensors = drafters.tensors() | {"d2t": torch.zeros(V, dtype=torch.int64), "t2d": torch.ones(V).bool()}
        assert not _open(drafters.write(tmp_path / "d", drafters.config(), tensors)).spec.truncated

    def test_speculators_folder_is_described_by_its_nested_keys(self):
        """Catches: keys that speculators nests in transformer_layer_config not found."""
        layer = drafters.config(architectures=None)
        config = {"speculators_model_type": "eagle3", "speculators_config": {}, "transformer_layer_config": layer}
        assert is_low_rank(config)
        assert head_spec(flatten(config | {"draft_vocab_size": 32})).draft_vocab_size == 32

    def test_dense_drafter_is_described_without_a_low_rank_head(self, tmp_path):
        """Catches: a stock drafter treated as a SlimSpec one."""
        config = drafters.config(architectures=["LlamaForCausalLMEagle3"], lm_head_rank=None)
        assert _open(drafters.write(tmp_path / "d", config, drafters.dense(drafters.tensors()))).spec is None

    @pytest.mark.parametrize(
        ("kind", "stored"),
        [
            ("fp8", torch.zeros(V, R).to(torch.float8_e4m3fn)),
            ("int8", torch.zeros(V, R, dtype=torch.int8)),
            ("int4", torch.zeros(V, R // 2, dtype=torch.uint8)),
        ],
    )
    def test_stored_quantized_head_is_described_with_its_bytes(self, tmp_path, kind, stored):
        """Catches: a quantized form on disk refused, or its bytes counted as if it were in the model's dtype."""
        tensors = drafters.tensors() | {UP: stored, "lm_head.up.scale": torch.ones(V, 1)}
        checkpoint = _open(drafters.write(tmp_path / "d", drafters.config(lm_head_quantization=kind), tensors))
        assert checkpoint.spec.quantization == kind
        assert checkpoint.head_bytes == 4 * R * D + stored.numel() + 4 * V
        assert checkpoint.dense_bytes == 4 * V * D

    def test_float_head_with_quantization_at_load_is_accepted(self, tmp_path):
        """Catches: factors in floats refused where config.json asks for quantization at load."""
        config = drafters.config(lm_head_quantization="int8")
        assert _open(drafters.write(tmp_path / "d", config, drafters.tensors())).spec.quantization == "int8"

    @pytest.mark.parametrize("rows", [None, "target"])
    def test_dense_rows_of_a_reranking_head_are_described(self, tmp_path, rows):
        """Catches: the dense rows of a re-ranking head taken for a second head, or called missing where the target has
        them."""
        tensors = drafters.tensors() | ({} if rows else {"lm_head.weight": torch.zeros(V, D)})
        config = drafters.config(lm_head_rerank=16, lm_head_rerank_rows=rows)
        spec = _open(drafters.write(tmp_path / "d", config, tensors)).spec
        assert (spec.rerank, spec.rerank_rows) == (16, rows or "own")

    @pytest.mark.parametrize("rerank", [None, 4])
    @pytest.mark.parametrize("kind", [None, "int8"])
    @pytest.mark.parametrize("vocab", [V, 32])
    def test_tiered_folder_is_described_with_the_bytes_that_are_read(self, tmp_path, vocab, kind, rerank):
        """Catches: a tiered folder refused, or bytes without the exact rows, with rows for all tokens in `up`, or with
        all rows of re-ranking instead of k."""
        tensors = drafters.tensors(vocab) | ({} if rerank is None else {DENSE: torch.zeros(vocab, D)})
        tensors = drafters.tiered(tensors, 20)
        tail = vocab - 20
        if kind:
            tensors |= {UP: torch.zeros(tail, R, dtype=torch.int8), SCALE: torch.ones(tail, 1)}
        keys = {"lm_head_frequent": 20, "lm_head_rerank": rerank, "lm_head_quantization": kind}
        folder = drafters.write(tmp_path / "d", drafters.config(draft_vocab_size=vocab, **keys), tensors)
        checkpoint = _open(folder)
        assert (checkpoint.spec.frequent, checkpoint.spec.tail) == (20, tail)
        up = tail * (R + 4 if kind else 4 * R)
        again = 4 * (D + 1) if rerank is None else 4 * D * rerank
        assert checkpoint.head_bytes == checkpoint.spec.bytes(4) == 4 * R * D + up + 4 * 20 * D + again
        assert checkpoint.dense_bytes == 4 * vocab * D
        result = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
        assert json.loads(result.stdout)["exact_tokens"] == 20

    def test_every_file_of_an_index_is_read(self, tmp_path):
        """Catches: only the first weight file of a sharded drafter read."""
        folder = drafters.write(tmp_path / "d", drafters.config(), {})
        tensors = drafters.tensors()
        (folder / "model.safetensors").unlink()
        from safetensors.torch import save_file

        half = len(tensors) // 2
        names = list(tensors)
        for i, part in enumerate((names[:half], names[half:])):
            save_file({n: tensors[n] for n in part}, folder / f"model-{i}.safetensors")
        index = {n: f"model-{int(i >= half)}.safetensors" for i, n in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        assert _open(folder).spec.rank == R


def _spoil(name, **changes):
    return pytest.param(lambda c, t: (c | changes, t), list(changes), id=name)


def _drop(c, *keys):
    return {k: v for k, v in c.items() if k not in keys}


BAD = [
    pytest.param(lambda c, t: (_drop(c, "lm_head_rank"), t), ["config.json", "lm_head_rank"], id="rank missing"),
    _spoil("rank zero", lm_head_rank=0),
    _spoil("rank negative", lm_head_rank=-8),
    _spoil("rank above D", lm_head_rank=D + 1),
    _spoil("rank not a number", lm_head_rank="8"),
    _spoil("rank true", lm_head_rank=True),
    pytest.param(
        lambda c, t: (c | {"lm_head_rank": 4}, t), [DOWN, "[8, 64]", "lm_head_rank"], id="rank not the tensors'"
    ),
    _spoil("divisor below 2", lm_head_rank=None, lm_head_rank_divisor=1),
    _spoil("divisor above D", lm_head_rank=None, lm_head_rank_divisor=D + 1),
    pytest.param(
        lambda c, t: (c | {"lm_head_rank": None, "lm_head_rank_divisor": 5}, t), [DOWN, "[8, 64]"], id="divisor not R"
    ),
    _spoil("rank and divisor disagree", lm_head_rank_divisor=4),
    pytest.param(lambda c, t: (c, _drop(t, UP)), [UP, "missing"], id="up missing"),
    pytest.param(lambda c, t: (c, _drop(t, DOWN)), [DOWN, "missing"], id="down missing"),
    pytest.param(lambda c, t: (c, t | {UP: t[UP].index_fill(0, torch.tensor(3), torch.nan)}), [UP, "NaN"], id="nan"),
    pytest.param(lambda c, t: (c, t | {DOWN: t[DOWN] / 0}), [DOWN, "Inf"], id="inf"),
    pytest.param(lambda c, t: (c, t | {UP: t[UP].double()}), [UP, "F64"], id="dtype"),
    pytest.param(lambda c, t: (c, t | {UP: t[UP].to(torch.int8)}), [UP, "I8"], id="int8 without its key"),
    pytest.param(
        lambda c, t: (c, t | {"lm_head.weight": torch.zeros(V, D)}),
        ["lm_head.weight", "lm_head_rerank"],
        id="dense too",
    ),
    pytest.param(lambda c, t: (c, t | {"lm_head.bias": torch.zeros(V)}), ["lm_head.bias", "remove"], id="a bias"),
    pytest.param(
        lambda c, t: (c, t | {"verifier_lm_head.weight": torch.zeros(V, D)}),
        ["verifier_lm_head.weight", "remove"],
        id="a head of the target",
    ),
    _spoil("logits scaled away", logit_scale=0),
    _spoil("logits turned round", logit_scale=-1.0),
    _spoil("logits scaled by a word", logit_scale="1"),
    _spoil("draft vocabulary above the target's", draft_vocab_size=V + 1),
    pytest.param(lambda c, t: (c | {"draft_vocab_size": 32}, t), [UP, "draft_vocab_size"], id="draft vocab not up's"),
    pytest.param(
        lambda c, t: (c | {"draft_vocab_size": 32}, t | {UP: t[UP][:32].clone()}), ["d2t", "missing"], id="no map"
    ),
    pytest.param(
        lambda c, t: (c | {"draft_vocab_size": 32}, drafters.tensors(32) | {"d2t": torch.full((32,), V)}),
        ["d2t[0]", str(V)],
        id="map out of range",
    ),
    pytest.param(
        lambda c, t: (c | {"draft_vocab_size": 32}, drafters.tensors(32) | {"d2t": -torch.arange(32)}),
        ["d2t", "several"],
        id="map not one to one",
    ),
    pytest.param(lambda c, t: (c, t | {"d2t": torch.arange(V).flip(0)}), ["d2t", "not zero"], id="map on a full one"),
    pytest.param(lambda c, t: (c, _drop(t, "fc.weight")), ["fc.weight"], id="body not whole"),
    pytest.param(lambda c, t: (c | {"architectures": ["GPT2"]}, t), ["architectures", "GPT2"], id="architecture"),
    pytest.param(
        lambda c, t: (c | {"lm_head_rerank": 16}, t), ["lm_head.weight", "missing"], id="no rows to re-rank by"
    ),
    _spoil("re-rank zero", lm_head_rerank=0),
    _spoil("re-rank above V", lm_head_rerank=V + 1),
    _spoil("rows without re-rank", lm_head_rerank_rows="target"),
    _spoil("rows of nobody", lm_head_rerank=8, lm_head_rerank_rows="mine"),
    pytest.param(
        lambda c, t: (
            c | {"lm_head_rerank": 8, "lm_head_rerank_rows": "target"},
            t | {"lm_head.weight": torch.zeros(V, D)},
        ),
        ["lm_head.weight", "lm_head_rerank_rows"],
        id="own rows and the target's",
    ),
    _spoil("unknown quantization", lm_head_quantization="int3"),
    _spoil("group without quantization", lm_head_quantization_group=32),
    _spoil("group that does not divide R", lm_head_quantization="int8", lm_head_quantization_group=32),
    pytest.param(
        lambda c, t: (c | {"lm_head_quantization": "int8"}, t | {UP: t[UP].to(torch.int8)}),
        ["lm_head.up.scale", "missing"],
        id="int8 without scale",
    ),
    pytest.param(
        lambda c, t: (c, t | {"lm_head.up.scale": torch.ones(V, 1)}), ["lm_head.up.scale"], id="scale without quantized"
    ),
    pytest.param(
        lambda c, t: (
            c | {"lm_head_quantization": "fp8"},
            t | {UP: t[UP].to(torch.int8), "lm_head.up.scale": torch.ones(V, 1)},
        ),
        [UP, "I8", "F8_E4M3"],
        id="quantized otherwise than it says",
    ),
    pytest.param(
        lambda c, t: (
            c | {"lm_head_quantization": "int4"},
            t | {UP: torch.zeros(V, R, dtype=torch.uint8), "lm_head.up.scale": torch.ones(V, 1)},
        ),
        [UP, "rank / 2"],
        id="int4 not packed",
    ),
]


N1 = 20


def _tiered(name, words, drop=(), count=N1, **changes):
    """Return a case of a tiered drafter, with other tensors (or functions of the sound ones) in the place of some."""

    def spoil(c, t):
        t = drafters.tiered(t, N1)
        new = {key: make(t) if callable(make) else make for key, make in changes.items()}
        return c | {"lm_head_frequent": count}, _drop(t | {NAMES[key]: tensor for key, tensor in new.items()}, *drop)

    return pytest.param(spoil, words, id=f"tiered: {name}")


NAMES = {"rows": FREQUENT, "ids": IDS, "row": TAIL_ROW, "bias": TAIL_BIAS, "up": UP, "dense": DENSE}
BAD += [
    _tiered("no token", ["config.json", "lm_head_frequent=0", "positive"], count=0),
    _tiered("all tokens", ["lm_head_frequent=128", "1 to 127"], count=V),
    _tiered("not a number", ["lm_head_frequent='20'"], count="20"),
    _tiered("another number of rows", [UP, "draft_vocab_size - lm_head_frequent", "lm_head_frequent"], count=N1 + 1),
    _tiered("no key", [FREQUENT, "lm_head_frequent is missing"], count=None),
    *(_tiered(f"{name} missing", [name, "is missing"], drop=[name]) for name in (FREQUENT, IDS, TAIL_ROW, TAIL_BIAS)),
    _tiered("up of all tokens", [UP, "[108, 8]"], up=torch.zeros(V, R)),
    _tiered("rows of another width", [FREQUENT, "[20, 64]"], rows=torch.zeros(N1, D + 1)),
    _tiered("rows in int8", [FREQUENT, "I8", "F32"], rows=torch.zeros(N1, D, dtype=torch.int8)),
    _tiered("rows not finite", [FREQUENT, "NaN"], rows=torch.full((N1, D), torch.nan)),
    _tiered("a row for each token", [TAIL_ROW, "[64]"], row=torch.zeros(N1, D)),
    _tiered("two biases", [TAIL_BIAS, "one number"], bias=torch.zeros(2)),
    _tiered("ids in int32", [IDS, "I32", "I64"], ids=lambda t: t[IDS].int()),
    _tiered("ids too many", [IDS, "[20]"], ids=torch.arange(N1 + 1)),
    _tiered("id too large", [f"{IDS}[19] = 128", "0 to 127"], ids=lambda t: t[IDS].index_fill(0, torch.tensor(19), V)),
    _tiered("id negative", [f"{IDS}[0] = -1", "0 to 127"], ids=lambda t: t[IDS].index_fill(0, torch.tensor(0), -1)),
    _tiered("id twice", [f"{IDS}[7] = 6 is there twice"], ids=torch.arange(N1) - (torch.arange(N1) == 7).long()),
    _tiered("ids not sorted", [f"{IDS}[1] = 18 comes after 19", "ascend"], ids=torch.arange(N1).flip(0)),
]


@pytest.mark.parametrize(("spoil", "words"), BAD)
def test_bad_drafter_is_refused_with_its_file_and_key(tmp_path, spoil, words):
    """Catches: a bad drafter that loads, or an error that does not say which key of which file to mend."""
    config, tensors = spoil(drafters.config(), drafters.tensors())
    folder = drafters.write(tmp_path / "drafter", {k: v for k, v in config.items() if v is not None}, tensors)
    with pytest.raises(CheckpointError) as error:
        _open(folder)
    message = str(error.value)
    assert "\n" not in message
    assert str(folder) in message
    for word in words:
        assert word in message
    result = CliRunner().invoke(app, ["inspect", str(folder)])
    assert result.exit_code == 1
    assert f"error: {message}" in result.stderr


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_count_not_finite_counts_every_nan_and_infinity(dtype):
    """Catches: a NaN or infinity overlooked beside others, in a later piece, or in a type that has no arithmetic."""
    tensor = torch.ones(3, 1_000_001).to(dtype)
    assert count_not_finite(tensor) == 0
    tensor[0, 5] = tensor[2, 1_000_000] = torch.nan
    tensor[1, 7] = torch.nan if dtype == torch.float8_e4m3fn else -torch.inf
    assert count_not_finite(tensor) == 3
    assert count_not_finite(torch.empty(0, 4, dtype=dtype)) == 0
    assert count_not_finite(torch.ones(4, dtype=torch.int8)) == 0


class TestSizes:
    @pytest.mark.parametrize("keys", [{}, {"num_aux_layers": 4}, {"num_aux_hidden_states": 4}])
    @pytest.mark.parametrize("family", ["Llama", "Qwen3"])
    def test_width_of_fc_follows_the_number_of_aux_layers(self, tmp_path, family, keys):
        """Catches: fc sized by other keys than those that vLLM's class of the family reads."""
        ids, tensors = [0, 1, 2, 3], drafters.tensors(family=family.lower()) | {"fc.weight": torch.zeros(D, 4 * D)}
        architectures = [f"SlimSpec{family}ForCausalLMEagle3"]
        config = drafters.config(architectures=architectures, eagle_aux_hidden_state_layer_ids=ids, **keys)
        folder = drafters.write(tmp_path / "d", config, tensors)
        if family == "Qwen3" or "num_aux_hidden_states" in keys:
            checkpoint = _open(folder)
            checkpoint.check_sizes(D, 4, "t")
            assert checkpoint.aux_layers() == (4, ids)
        else:
            with pytest.raises(CheckpointError, match=r"fc.weight has shape .*; add num_aux_hidden_states=4"):
                _open(folder)

    def test_aux_layers_below_eagle_config_are_checked(self, tmp_path):
        """Catches: aux layers named below eagle_config that are counted, but whose ids are not checked."""
        config = drafters.config(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 2, 9]})
        del config["eagle_aux_hidden_state_layer_ids"]
        checkpoint = _open(drafters.write(tmp_path / "d", config, drafters.tensors()))
        with pytest.raises(CheckpointError, match=r"\[0, 2, 9\] must be 3 different ids from 0 to 4"):
            checkpoint.check_sizes(D, 4, "t")

    @pytest.mark.parametrize(("width", "words"), [(2 * D, None), (None, f"add target_hidden_size={2 * D}")])
    def test_drafter_narrower_than_its_target_is_accepted_where_vllm_loads_it(self, tmp_path, width, words):
        """Catches: a drafter narrower than its target that is accepted although vLLM cannot load it, or refused
        although it can."""
        tensors = {"fc.weight": torch.zeros(D, 6 * D), "embed_tokens.weight": torch.zeros(V, D)}
        config = drafters.config(target_hidden_size=width)
        folder = drafters.write(tmp_path / "d", config, drafters.tensors() | tensors)
        if words is None:
            _open(folder).check_sizes(2 * D, 4, "t")
        else:
            with pytest.raises(CheckpointError, match=words):
                _open(folder)


class TestRefusedFiles:
    def _error(self, folder):
        with pytest.raises(CheckpointError) as error:
            _open(folder)
        assert "\n" not in str(error.value)
        return str(error.value)

    def test_missing_folder_is_refused_in_one_line(self, tmp_path):
        """Catches: a traceback for a mistyped path, or a hub that is asked for it."""
        assert "no such folder" in self._error(tmp_path / "none")

    def test_folder_without_a_config_is_refused(self, tmp_path):
        """Catches: weights without a config.json taken for a drafter of default sizes."""
        folder = drafters.write(tmp_path / "d", {}, drafters.tensors())
        (folder / "config.json").unlink()
        assert "config.json" in self._error(folder)

    def test_config_that_is_not_json_is_refused_by_its_name(self, tmp_path):
        """Catches: a traceback of the JSON parser that does not name the file."""
        folder = drafters.write(tmp_path / "d", {}, drafters.tensors())
        (folder / "config.json").write_text("{")
        assert "not valid JSON" in self._error(folder)

    def test_pickled_weights_are_refused_with_a_command_that_converts_them(self, tmp_path):
        """Catches: a .bin file opened, which can run code, where an error should give the command that converts it."""
        folder = drafters.write(tmp_path / "d", drafters.config(), drafters.tensors())
        (folder / "model.safetensors").unlink()
        torch.save(drafters.tensors(), folder / "pytorch_model.bin")
        message = self._error(folder)
        assert "pytorch_model.bin" in message
        assert "weights_only=True" in message

    def test_command_given_for_pickled_weights_works(self, tmp_path):
        """Catches: an error message whose command does not convert the pickled weights."""
        import shlex
        import subprocess
        import sys

        folder = drafters.write(tmp_path / "d", drafters.config(), drafters.tensors())
        (folder / "model.safetensors").unlink()
        torch.save(drafters.tensors(), folder / "pytorch_model.bin")
        command = shlex.split(self._error(folder).split("you trust it: ")[1])
        subprocess.run([sys.executable, *command[1:]], cwd=folder, check=True)
        assert _open(folder).spec.rank == R

    def test_folder_without_weights_is_refused_when_opened(self, tmp_path):
        """Catches: a drafter without weights that is refused only when its first tensor is wanted."""
        folder = drafters.write(tmp_path / "d", drafters.config(), drafters.tensors())
        (folder / "model.safetensors").unlink()
        assert "no .safetensors" in self._error(folder)

    @pytest.mark.parametrize("keep", [0, 4, 100, 20_000])
    def test_truncated_weight_file_is_refused(self, tmp_path, keep):
        """Catches: a half-copied weight file read as far as it goes."""
        folder = drafters.write(tmp_path / "d", drafters.config(), drafters.tensors())
        file = folder / "model.safetensors"
        os.truncate(file, keep)
        assert "model.safetensors" in self._error(folder)

    def test_index_that_names_a_file_outside_the_folder_is_refused(self, tmp_path):
        """Catches: path traversal through an index file."""
        folder = drafters.write(tmp_path / "d", drafters.config(), drafters.tensors())
        index = {"weight_map": {UP: "../other/model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "../other" in self._error(folder)

    def test_target_given_as_a_drafter_is_refused(self, tmp_path):
        """Catches: a whole language model described as a drafter."""
        config = drafters.config(architectures=["LlamaForCausalLM"], lm_head_rank=None)
        tensors = {"model.layers.0.mlp.down_proj.weight": torch.zeros(4, 4), "lm_head.weight": torch.zeros(V, D)}
        assert "not an EAGLE-3 drafter" in self._error(drafters.write(tmp_path / "d", config, tensors))

    def test_drafter_of_another_vocabulary_than_the_targets_is_refused(self, tmp_path):
        """Catches: a drafter for another vocabulary, whose ids would mean other tokens."""
        checkpoint = _open(drafters.write(tmp_path / "d", drafters.config(), drafters.tensors()))
        with pytest.raises(CheckpointError, match=f"vocab_size={V} but the target big has 512"):
            checkpoint.check_target(512, "big")


class TestWrite:
    def test_written_drafter_is_read_back_unchanged(self, tmp_path):
        """Catches: a tensor changed, or provenance lost, on the way to disk."""
        tensors = drafters.tensors()
        written = write_checkpoint(tmp_path / "out", drafters.config(), tensors, {"command": "x"})
        for name, tensor in tensors.items():
            assert torch.equal(written.load(name), tensor)
        assert json.loads((tmp_path / "out" / "slimspec.json").read_text()) == {"command": "x"}

    def test_refused_checkpoint_leaves_no_folder(self, tmp_path):
        """Catches: a half-written folder that a later run takes for a drafter."""
        bad = drafters.tensors() | {UP: torch.full((V, R), torch.nan)}
        with pytest.raises(CheckpointError, match="NaN"):
            write_checkpoint(tmp_path / "out", drafters.config(), bad, {})
        assert list(tmp_path.iterdir()) == []

    def test_existing_folder_is_not_overwritten(self, tmp_path):
        """Catches: somebody's files overwritten by a new drafter."""
        (tmp_path / "file").write_text("mine")
        with pytest.raises(OutputError, match="not an empty folder"):
            write_checkpoint(tmp_path, drafters.config(), drafters.tensors(), {})
        assert [f.name for f in tmp_path.iterdir()] == ["file"]


class TestInspect:
    def test_inspect_json_states_the_bytes_of_the_files(self, tmp_path):
        """Catches: byte counts in `slimspec inspect --json` that are not those of the files."""
        folder = drafters.write(tmp_path / "d", drafters.config(), drafters.tensors())
        result = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
        assert result.exit_code == 0
        report = json.loads(result.stdout)
        assert report["servable"]
        assert report["head_bytes"] == 4 * R * (D + V)
        assert report["dense_bytes"] == 4 * V * D

    def test_inspect_table_states_the_saving_in_served_bytes(self, tmp_path):
        """Catches: a saving computed from other bytes than those that are served."""
        folder = drafters.write(tmp_path / "d", drafters.config(), drafters.tensors())
        result = CliRunner().invoke(app, ["inspect", str(folder)])
        assert "5.33x" in result.stdout
