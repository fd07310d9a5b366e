"""The weighted factorization: exact for heads of that rank, and better than plain SVD on anisotropic states."""

import pytest
import torch

from vllm_slimspec.head.factorize import factorize, second_moment, token_probabilities

V, D, R = 507, 48, 6


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def anisotropic_states(n: int) -> torch.Tensor:
    """Return states that vary mostly in a few directions around a large mean, as after a transformer's final norm."""
    return (torch.randn(n, D) * torch.logspace(0, -3, D)) @ torch.linalg.qr(torch.randn(D, D)).Q + 0.5


def statistics(weight, states):
    return {"second_moment": second_moment(states), "probabilities": token_probabilities(weight, states)}


def test_plain_svd_reproduces_a_head_of_exact_rank():
    """Catches: factors swapped, transposed or scaled, or a Gram matrix whose squares lose the small directions."""
    weight = torch.randn(V, R) @ torch.randn(R, D)
    down, up = factorize(weight, R)
    torch.testing.assert_close(up @ down, weight, rtol=1e-5, atol=1e-5)


def test_weighted_svd_reproduces_a_head_of_exact_rank_up_to_one_row():
    """Catches: a weighting that is not taken out of the factors again. A row that all logits share changes no
    choice."""
    weight, states = torch.randn(V, R) @ torch.randn(R, D), anisotropic_states(400)
    down, up = factorize(weight, R, **statistics(weight, states))
    difference = weight - up @ down
    torch.testing.assert_close(difference, difference[:1].expand_as(difference), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((states @ down.T @ up.T).softmax(-1), (states @ weight.T).softmax(-1))


def test_plain_svd_has_the_optimal_error_of_eckart_and_young():
    """Catches: directions kept other than the largest, one too few or too many."""
    weight = torch.randn(V, D)
    down, up = factorize(weight, R)
    left_out = torch.linalg.svdvals(weight)[R:].norm()
    torch.testing.assert_close((weight - up @ down).norm(), left_out, rtol=1e-5, atol=0)


def test_weighted_svd_agrees_more_than_plain_on_anisotropic_states():
    """Catches: weights applied on the wrong side, or squared: agreement then falls below that of the plain factors."""
    weight, states = torch.randn(V, D), anisotropic_states(2000)
    calibration, held_out = states[:1000], states[1000:]
    dense = (held_out @ weight.T).argmax(-1)

    def agreement(**kwargs):
        down, up = factorize(weight, R, **kwargs)
        return ((held_out @ down.T @ up.T).argmax(-1) == dense).float().mean()

    weighted = agreement(second_moment=second_moment(calibration))
    assert weighted > agreement() + 0.2
    assert agreement(**statistics(weight, calibration)) > weighted - 0.02


def test_chunks_do_not_change_the_factors(monkeypatch):
    """Catches: rows of a vocabulary left out or counted twice where it is read in chunks."""
    weight, states = torch.randn(V, D), anisotropic_states(300)
    whole = factorize(weight, R, **statistics(weight, states))
    monkeypatch.setattr("vllm_slimspec.head.factorize._CHUNK", 100)
    chunked = factorize(weight, R, **statistics(weight, states))
    torch.testing.assert_close(chunked[1] @ chunked[0], whole[1] @ whole[0])


def test_too_few_states_to_span_the_space_give_finite_factors():
    """Catches: a division by a singular covariance: NaN, or noise in directions where no state was seen."""
    weight, states = torch.randn(V, D), anisotropic_states(R)
    down, up = factorize(weight, R, second_moment=second_moment(states))
    assert torch.isfinite(down).all()
    torch.testing.assert_close(states @ down.T @ up.T, states @ weight.T, rtol=1e-2, atol=1e-2)


def test_factors_are_balanced_and_keep_the_dtype():
    """Catches: one factor of tiny and one of huge numbers, which half precision then rounds."""
    down, up = factorize(torch.randn(V, D, dtype=torch.bfloat16), R)
    assert (down.dtype, up.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (tuple(down.shape), tuple(up.shape)) == ((R, D), (V, R))
    rms = down.float().square().mean(1), up.float().square().mean(0)
    torch.testing.assert_close(*rms, rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    ("weight", "rank", "kwargs", "message"),
    [
        (torch.zeros(V), 1, {}, "must be a floating-point"),
        (torch.zeros(V, D, dtype=torch.int8), 1, {}, "must be a floating-point"),
        (torch.zeros(V, D), 0, {}, "rank=0 does not fit"),
        (torch.zeros(V, D), D + 1, {}, f"choose 1 to {D}"),
        (torch.full((V, D), torch.nan), R, {}, "NaN or Inf"),
        (torch.ones(V, D), R, {"second_moment": torch.ones(D)}, r"second_moment has shape \[48\]"),
        (torch.ones(V, D), R, {"probabilities": torch.ones(D)}, r"must be \[507\]"),
        (torch.ones(V, D), R, {"probabilities": torch.zeros(V)}, "all zero"),
    ],
)
def test_bad_head_rank_or_states_are_refused_in_one_line(weight, rank, kwargs, message):
    """Catches: a NaN that spreads into every factor, or an error of LAPACK that names nothing."""
    with pytest.raises(ValueError, match=message) as error:
        factorize(weight, rank, **kwargs)
    assert "\n" not in str(error.value)


def test_covariance_of_no_states_is_refused():
    """Catches: a covariance of no states at all, which is 0 / 0."""
    with pytest.raises(ValueError, match="N >= 1"):
        second_moment(torch.zeros(0, D))
