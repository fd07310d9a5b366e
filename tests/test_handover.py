"""Every tensor that a draft model hands to vLLM is contiguous and of the dtype that vLLM reads. No engine starts
here."""

from functools import partial

import draft_models
import drafters
import pytest
import torch
from drafters import D, V

from vllm_slimspec.head import layer as head_module
from vllm_slimspec.head import ops
from vllm_slimspec.head.handover import hand_over
from vllm_slimspec.head.spec import DENSE, SCALE, UP

DRAFT_VOCAB = 40  # vLLM pads it to 64 rows, the int4 layout of CPUs to 48
RANK = 32  # what the integer kernels of CPUs take
# One row hides every stride. The integer kernels of CPUs take up to four rows; Triton's interpreter is slow.
BATCHES = {"torch": (3, 5), "triton": (2,)}


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    with draft_models.parallel_groups(tmp_path_factory.mktemp("groups")):
        yield


@pytest.fixture
def build(groups, tmp_path, monkeypatch):
    """See draft_models.build."""
    from vllm_slimspec.kernels import low_rank_topk

    monkeypatch.setattr(low_rank_topk, "CHUNK", 16)  # Triton's interpreter takes half a second to sort 1024 groups
    return partial(draft_models.build, tmp_path)


@pytest.fixture
def two_ranks(monkeypatch):
    """Makes this process the first of two tensor-parallel ranks; the second sends the same as the first."""
    from vllm.model_executor.layers import vocab_parallel_embedding as vocabulary
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    def gather(tensor, dim=-1):
        return torch.cat([tensor, tensor], dim=dim)

    monkeypatch.setattr(vocabulary, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(vocabulary, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(head_module, "tensor_model_parallel_all_gather", gather)
    monkeypatch.setattr(LogitsProcessor, "_gather_logits", lambda self, logits: gather(logits))


def _target_head(vocabulary, dtype):
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    head = ParallelLMHead(vocabulary, D, params_dtype=dtype)
    head.weight.data.normal_()
    return head


def _drafter(kind, vocabulary, rerank, dtype):
    """Return for a form of head: the tensors, config.json's changes, and the target's head if that re-ranks."""
    tensors = {name: tensor.to(dtype) for name, tensor in drafters.tensors(DRAFT_VOCAB, RANK).items() if name != "d2t"}
    size = DRAFT_VOCAB
    if vocabulary == "d2t":
        size, tensors["d2t"] = V, drafters.tensors(DRAFT_VOCAB)["d2t"]
    changes = {"vocab_size": size, "draft_vocab_size": DRAFT_VOCAB, "lm_head_rank": RANK}
    if kind != "plain":
        up = ops.quantize_up(tensors[UP], kind)
        tensors |= {UP: up.weight, SCALE: up.scale}
        changes["lm_head_quantization"] = kind
    if rerank != "no re-rank":
        changes["lm_head_rerank"] = 2
    if rerank == "target":
        changes["lm_head_rerank_rows"] = "target"
    if rerank == "own":
        tensors[DENSE] = torch.randn(DRAFT_VOCAB, D).to(dtype)
    return tensors, changes, _target_head(size, dtype) if rerank == "target" else None


def _check(model, impl, size, dtype):
    for batch in BATCHES[impl]:
        hidden = torch.randn(batch, D, generator=torch.Generator().manual_seed(batch)).to(dtype)
        ids, logits = model.get_top_tokens(hidden), model.compute_logits(hidden)
        assert (ids.shape, ids.dtype, ids.stride()) == ((batch,), torch.int64, (1,))
        assert (logits.shape, logits.dtype, logits.stride()) == ((batch, size), dtype, (size, 1))


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("torch", torch.float32), ("torch", torch.bfloat16), ("triton", torch.float32)],
    ids=["torch", "torch-bfloat16", "triton"],
)
@pytest.mark.parametrize("rerank", ["no re-rank", "own", "target"])
@pytest.mark.parametrize("vocabulary", ["full", "d2t"])
@pytest.mark.parametrize("kind", ["plain", "int8", "int4", "fp8"])
def test_ids_and_logits_of_every_head_are_contiguous(build, monkeypatch, kind, vocabulary, rerank, impl, dtype):
    """Catches: a strided view handed to a kernel of vLLM that is given no stride, which drafts wrong tokens for all
    requests of a batch but the first."""
    monkeypatch.setenv("SLIMSPEC_IMPL", impl)
    tensors, changes, head = _drafter(kind, vocabulary, rerank, dtype)
    model, _ = build(tensors, head=head, dtype=dtype, **changes)
    _check(model, impl, changes["vocab_size"], dtype)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(
    ("vocabulary", "rerank"),
    [("full", "no re-rank"), ("full", "own"), ("full", "target"), ("d2t", "no re-rank"), ("d2t", "own")],
)
@pytest.mark.parametrize("kind", ["plain", "int8"])
def test_ids_and_logits_of_two_ranks_are_contiguous(build, two_ranks, monkeypatch, kind, vocabulary, rerank, impl):
    """Catches: views into the gathered (value, id) pairs of two ranks handed to vLLM, or the padding of a rank in the
    logits."""
    monkeypatch.setenv("SLIMSPEC_IMPL", impl)
    tensors, changes, head = _drafter(kind, vocabulary, rerank, torch.float32)
    model, _ = build(tensors, head=head, **changes)
    assert model.low_rank_head.tp_size == 2
    _check(model, impl, changes["vocab_size"], torch.float32)


def test_hidden_states_are_contiguous_and_of_the_models_dtype(build, monkeypatch):
    """Catches: strided hidden states, or states of another dtype, passed on from a vLLM body to vLLM's kernels."""
    from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM

    model, _ = build(drafters.tensors())
    wide = torch.randn(3, 2 * D, dtype=torch.float64)
    monkeypatch.setattr(Eagle3LlamaForCausalLM, "forward", lambda *args: (wide[:, ::2], wide[:, D:]))
    monkeypatch.setattr(Eagle3LlamaForCausalLM, "combine_hidden_states", lambda *args: wide[:, ::2])
    hidden = torch.zeros(3, D)
    for states in (*model(None, None, hidden), model.combine_hidden_states(hidden)):
        assert (states.shape, states.dtype, states.stride()) == ((3, D), torch.float32, (D, 1))


def test_handing_over_a_contiguous_tensor_copies_nothing():
    """Catches: a needless copy at every draft step, which costs a GPU one more kernel."""
    ids = torch.arange(6)
    assert hand_over(ids, torch.int64) is ids
    column = ids.view(3, 2)[:, 1]
    assert hand_over(column, torch.int64).stride() == (1,)
    assert hand_over(column.int(), torch.int64).tolist() == [1, 3, 5]
