"""Quantized `up` factors and their layouts on a CPU: every form stands for the factor that it was made from."""

import re

import pytest
import torch
from factors import head
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_slimspec.head import ops
from vllm_slimspec.head.cpu import INTEGER_ROWS, PackedFactor
from vllm_slimspec.head.quantized import KINDS, QuantizedUp, pad_rank, quantize_up
from vllm_slimspec.head.spec import GROUPS

STEPS = {"fp8": 2**-4, "int8": 0.51 / 127, "int4": 0.54 / 7.5}
"""Largest error against the largest entry of a row: half a step, and what rounding the scale adds."""


@pytest.mark.parametrize("group_size", [None, *GROUPS])
@pytest.mark.parametrize("kind", KINDS)
def test_quantization_rounds_each_entry_within_half_a_step(kind, group_size):
    """Catches: a wrong scale, nibble order or sign, by which an entry is further from the original than half a step."""
    up = head(1, 70, 256)[2].bfloat16().float()
    up[3] = 0
    up[5, 7] = 100.0  # an outlier costs its own row or group only
    quantized = quantize_up(up, kind, group_size)
    assert quantized.kind == kind
    assert quantized.shape == up.shape
    groups = up.unflatten(1, (-1, group_size or 256))
    error = (quantized.dequantize().unflatten(1, groups.shape[1:]) - groups).abs().amax(dim=2)
    assert (error <= STEPS[kind] * groups.abs().amax(dim=2)).all()
    assert (quantized.dequantize()[3] == 0).all()


def test_stored_bytes_mean_the_documented_values():
    """Catches: another meaning of a checkpoint's bytes: which column is in which nibble, what a nibble is worth, which
    scale is whose."""
    weight = torch.tensor([[0x80, 0x1F]], dtype=torch.uint8).repeat(1, 16)
    scale = torch.tensor([[2.0, 0.5]])
    values = QuantizedUp(weight, scale, 32).dequantize()
    assert values[0, :4].tolist() == [-16.0, 0.0, 14.0, -14.0]
    assert values[0, 32:36].tolist() == [-4.0, 0.0, 3.5, -3.5]
    fp8 = QuantizedUp(torch.tensor([[448.0, -0.001953125]]).to(torch.float8_e4m3fn), torch.tensor([[0.5]]))
    assert fp8.dequantize().tolist() == [[224.0, -0.0009765625]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rank", "group_size"), [(30, None), (64, None), (96, 32)])
def test_padding_of_a_quantized_rank_is_zero(kind, rank, group_size):
    """Catches: padding of int4 that is not zero, because the nibble that stands for zero is 8."""
    quantized = quantize_up(head(1, 20, rank, torch.bfloat16)[2], kind, group_size)
    padded = pad_rank(quantized, 128).dequantize()
    assert torch.equal(padded[:, :rank], quantized.dequantize())
    assert (padded[:, rank:] == 0).all()


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 12),
    vocab=st.integers(1, 3000),
    rank=st.integers(1, 100).map(lambda n: 2 * n),
    kind=st.sampled_from([None, *KINDS]),
    group_size=st.sampled_from([None, 32]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_packed_head_gives_the_logits_of_its_factors(batch, vocab, rank, kind, group_size, dtype):
    """Catches: a backend that reads beyond a tail, crashes on an odd rank or loses a scale."""
    hidden, down, up = head(batch, vocab, rank, dtype)
    if kind:
        up = quantize_up(up, kind, group_size if rank % 32 == 0 else None)
    logits = ops.low_rank_logits(hidden, *ops.pack(down, up))
    weight = up.dequantize() if kind else up.float()
    z = (hidden.float() @ down.float().T).to(dtype).float()
    assert logits.shape == (batch, vocab)
    # one rounding of z differs by an ulp in some sums, weights of a group are rounded, and the result is
    allowed = 3 * torch.finfo(dtype).eps * (z.abs() @ weight.abs().T) + 1e-5
    assert ((logits.float() - z @ weight.T).abs() <= allowed).all()


@pytest.mark.parametrize("batch", [1, INTEGER_ROWS, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_top_1_of_a_packed_quantized_head_agrees_with_its_factor(kind, batch):
    """Catches: a quantized head that drafts another token than its factor does, by more than the rounding of a
    score."""
    hidden, down, up = head(batch, 5000, 128, torch.bfloat16)
    quantized = quantize_up(up, kind)
    values, ids = ops.low_rank_argmax(hidden, *ops.pack(down, quantized))
    scores = torch.nn.functional.linear(hidden, down).float() @ quantized.dequantize().T
    gap = scores.amax(dim=1) - scores.gather(1, ids[:, None]).squeeze(1)
    ulp = torch.finfo(torch.bfloat16).eps * scores.amax(dim=1).abs()
    assert (gap <= 2 * ulp).all()  # two scores, each rounded once to bfloat16 and once by its scale
    assert ((values - scores.amax(dim=1)).abs() <= 2 * ulp).all()


def test_batch_size_chooses_between_both_forms_of_a_quantized_factor():
    """Catches: a quantized head that uses one of its two products for every batch; they round differently, so they can
    be told apart."""
    _, _, up = head(1, 4000, 128, torch.bfloat16)
    packed = PackedFactor(quantize_up(up, "int8"), torch.bfloat16)
    z = torch.randn(INTEGER_ROWS + 1, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert not torch.equal(packed(z[:INTEGER_ROWS]), packed(z)[:INTEGER_ROWS])
    assert torch.equal(packed(z[:1]), packed(z[:INTEGER_ROWS])[:1])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda up: quantize_up(up, "int2"), ValueError, "kind must be one of fp8, int8, int4, got 'int2'"),
        (lambda up: quantize_up(up.int(), "int8"), TypeError, "up must be float32, float16 or bfloat16, got torch.in"),
        (lambda up: quantize_up(up[0], "int8"), ValueError, "up must have 2 dimensions, none empty, got shape (96,)"),
        (lambda up: quantize_up(up[:, :95], "int4"), ValueError, "up must have an even rank R for int4"),
        (lambda up: quantize_up(up, "int8", 64), ValueError, "group_size must be None or one of [32] for rank R=96"),
        (lambda up: quantize_up(up / 0, "int8"), ValueError, "up must be finite, got NaN or infinity in it"),
        (lambda up: QuantizedUp(up, up), TypeError, "up.weight must be float8_e4m3fn, int8 or uint8 (int4), got"),
        (lambda up: QuantizedUp(up.char(), up[:, :1].half()), TypeError, "up.scale must be float32, got torch.float16"),
        (lambda up: QuantizedUp(up.char(), up[:, :2].clone()), ValueError, "up.scale must be (9, 1), got (9, 2)"),
        (lambda up: QuantizedUp(up.char(), up[:, :1]), ValueError, "up.scale must be contiguous, got strides (96, 1)"),
        (
            lambda up: ops.low_rank_argmax(torch.ones(1, 4), *ops.pack(torch.ones(96, 4), up), impl="triton"),
            TypeError,
            "down and up were packed for torch, which impl='triton' cannot read; pack them for triton",
        ),
    ],
)
def test_factor_that_cannot_be_quantized_is_refused(make, error, message, monkeypatch):
    """Catches: a wrong argument that is quantized or packed all the same."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(error, match=re.escape(message)):
        make(torch.ones(9, 96))
