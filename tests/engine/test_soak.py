"""The soak of ``tests/soak.py``, for a minute."""

import soak


def test_a_minute_of_load(pair, tmp_path):
    """Catches: what only concurrency brings: answers mixed up, requests or memory left behind, one id wrong in many."""
    p = pair("llama", "full")
    result = soak.soak(p.target, p.drafter, p.prompts, seconds=60, work=tmp_path)
    assert soak.failures(result) == []
