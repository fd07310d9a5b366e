"""The simulated draft-and-verify cycles over an answer, and the acceptance length of what they count."""

import numpy as np
import pytest

from vllm_slimspec.common.walk import acceptance_length, walk

K = 3


def walk_in_words(accepted: dict[int, int]) -> list[int]:
    """Count cycles as one would by hand, from the drafts that are accepted at each known place."""
    counts, place = [0] * (K + 1), min(accepted, default=0)
    while place <= max(accepted, default=-1):
        if place in accepted:
            for position in range(accepted[place] + 1):
                counts[position] += 1
            place += accepted[place] + 1
        else:
            place += 1
    return counts


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_walk_starts_each_cycle_where_the_last_one_ended(missing):
    """Catches: a mean over places, a cycle that starts at the wrong place, right drafts counted behind a wrong one, or
    an unknown place taken for one where nothing is accepted."""
    rng = np.random.default_rng(0)
    for length in (0, 1, 5, 60):
        hits = rng.random((length, K)) < 0.7
        places = np.flatnonzero(rng.random(length) >= missing)
        accepted = {int(p): next((k for k in range(K) if not hits[p, k]), K) for p in places}
        assert walk(places, hits[places]).tolist() == walk_in_words(accepted)


def test_walk_weighs_hard_places_by_the_cycles_that_start_there():
    """Catches: the formula 1 + the sum of the rates over places, which gives 1.67 here."""
    hits = np.tile([[True], [True], [False]], (33, 1))  # K = 1: behind an accepted draft comes the hard place
    counts = walk(np.arange(99), hits)
    assert counts.tolist() == [66, 33]
    assert acceptance_length(counts[None]).value == 1.5


def test_acceptance_length_is_of_all_documents_together():
    """Catches: a mean of the documents' own lengths, or documents without a cycle that make it NaN or change it."""
    counts = np.array([[10, 5, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    found = acceptance_length(counts)
    assert found.value == pytest.approx(1 + 8 / 11)
    assert 1.5 == found.low < found.value < found.high == 4
    assert acceptance_length(counts[:2]) == found
    half = acceptance_length(counts, of=counts * [1, 3, 0, 0])
    assert half.value == pytest.approx((1 + 8 / 11) / (1 + 18 / 11))
    same = acceptance_length(counts, of=counts)
    assert (same.value, same.low, same.high) == (1, 1, 1)
