"""What the soak counts as wrong, since a comparison that accepts everything would find nothing."""

import pytest
import soak

EXPECTED = soak.Answer(
    ids=[5, 6, 7],
    text="a b c",
    top=[{"a": -0.1, "x": -3.0}, {"b": -0.7, "y": -0.70005}, {"c": -0.1, "x": -0.3}],
    words=["a", "b", "c"],
)


@pytest.mark.parametrize(
    ("ids", "text", "words", "near", "wrong"),
    [
        pytest.param([5, 6, 7], "a b c", ["a", "b", "c"], 0, 0, id="the same"),
        pytest.param([5, 6], "a b", ["a", "b"], 0, 0, id="shorter"),
        pytest.param([5, 9], "a y", ["a", "y"], 1, 0, id="near tie"),
        pytest.param([9, 6], "x b", ["x", "b"], 0, 1, id="another token"),
        pytest.param([5, 6, 9], "a b x", ["a", "b", "x"], 0, 1, id="second best, but not near"),
        pytest.param([5, 9], "a z", ["a", "z"], 0, 1, id="a token that the target did not think of"),
        pytest.param([5, 6], "a q", ["a", "b"], 0, 1, id="another text"),
        pytest.param([5, 9], "", [], 0, 1, id="no log-probabilities to tell"),
    ],
)
def test_compare_tells_equal_near_tie_and_wrong_answers_apart(ids, text, words, near, wrong):
    """Catches: a wrong answer that the soak counts as a near tie, or as right."""
    tally = soak.Tally()
    soak.compare(tally, "plain", EXPECTED, ids, text, words)
    assert (tally.near_ties, len(tally.wrong), tally.tokens) == (near, wrong, len(ids))


def _result(**changes):
    good = {
        "command": "x",
        "time": "2026-01-01T00:00:00Z",
        "versions": {},
        "device": "cpu",
        "seconds": soak.LONG,
        "clients": 1,
        "requests": dict.fromkeys(soak.KINDS, 1),
        "tokens": 10_000,
        "wrong": 0,
        "errors": 0,
        "near_ties": 1,
        "preemptions": 1,
        "prefix_cache_hits": 1,
        "acceptance_length": 2.0,
        "memory": {"engine": {"start": 1, "end": 1, "slope_per_minute": 0}},
        "memory_alone": {"engine": {"start": 1, "end": 1, "slope_per_minute": 0}},
        "left_running": 0,
        "left_processes": 0,
    }
    return soak.Soak(**good | changes)


@pytest.mark.parametrize(
    "change",
    [
        {"wrong": 1},
        {"errors": 1},
        {"near_ties": 2},
        {"preemptions": 0},
        {"prefix_cache_hits": 0},
        {"acceptance_length": 1.0},
        {"requests": {"plain": 1}},
        {"memory": {"engine": {"start": 1, "end": 9, "slope_per_minute": soak.FLAT + 1}}},
        {"left_running": 1},
        {"left_processes": 1},
    ],
)
def test_each_bad_count_fails_the_soak(change):
    """Catches: a bad count, such as a wrong answer or a process left behind, with which the soak still passes."""
    assert soak.failures(_result()) == []
    assert len(soak.failures(_result(**change))) == 1


def test_memory_growth_is_judged_against_that_of_the_target_alone():
    """Catches: vLLM's own growth of memory blamed on the drafter, or the drafter's excused by it."""
    grows = {"engine": {"start": 1, "end": 9, "slope_per_minute": soak.FLAT + 5}}
    less = {"engine": {"start": 1, "end": 9, "slope_per_minute": 4}}
    more = {"engine": {"start": 1, "end": 9, "slope_per_minute": 6}}
    assert len(soak.failures(_result(memory=grows, memory_alone=less))) == 1
    assert soak.failures(_result(memory=grows, memory_alone=more)) == []


def test_soak_prompts_vary_in_length_and_share_beginnings():
    """Catches: soak prompts of one length, or none with a common beginning, so that prefix caching is not exercised."""
    prompts = soak.make_prompts([[1, 2, 3], [4, 5]])
    lengths = {len(p) for p in prompts}
    assert min(lengths) < 10
    assert max(lengths) > 150
    assert len(prompts) == soak.PROMPTS
    assert sum(p[:96] == prompts[-1][:96] for p in prompts) >= soak.PROMPTS // 3


def test_memory_slope_is_that_of_the_second_half():
    """Catches: a slope of memory taken over the wrong half of the run, or in the wrong unit."""
    assert soak.line([(t, 100.0) for t in range(10)] + [(t, 3.0 * t) for t in range(10, 20)]) == pytest.approx(3.0)
