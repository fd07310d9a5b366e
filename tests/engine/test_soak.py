"""A soak of one minute by ``tools/soak.py``."""

import pytest
import soak

pytestmark = pytest.mark.broad


def test_server_stands_a_minute_of_concurrent_load(pair, tmp_path):
    """Catches: answers mixed up between requests, requests or memory left behind, or one wrong id in many, which only
    concurrency causes."""
    p = pair("llama", "full")
    result = soak.soak(p.target, p.drafter, p.prompts, seconds=60, work=tmp_path)
    assert soak.failures(result) == []
