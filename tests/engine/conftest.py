"""Engines in the test's process, few and shared; and pairs of target and drafter, trained once and kept under
build/."""

import gc
import hashlib
import shutil
from pathlib import Path

import engines
import pytest

ROOT = Path(__file__).parent.parent.parent


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engine)


@pytest.fixture(scope="session")
def pair():
    """(family, draft_vocab) -> a trained pair, kept while the code that trains it stays the same."""
    from pairs import Pair, make_pair

    sources = [ROOT / "tests/pairs.py", *sorted((ROOT / "vllm_slimspec/train").glob("*.py"))]
    sources += [ROOT / "vllm_slimspec/head/factorize.py"]
    key = hashlib.sha256(b"".join(f.read_bytes() for f in sources)).hexdigest()[:12]
    made: dict[tuple[str, str], Pair] = {}

    def get(family: str = "llama", draft_vocab: str = "full") -> Pair:
        if (family, draft_vocab) not in made:
            import torch

            folder = ROOT / "build" / "pairs" / key / f"{family}-{draft_vocab}"
            prompts = folder / "prompts.pt"
            if not prompts.is_file():
                shutil.rmtree(folder, ignore_errors=True)
                torch.save(make_pair(folder, family, draft_vocab).prompts, prompts)
            made[family, draft_vocab] = Pair(folder / "target", folder / "drafter", torch.load(prompts))
        return made[family, draft_vocab]

    return get


@pytest.fixture
def engine():
    """Start an offline engine that ends with the test (or with ``close``)."""
    from vllm import LLM

    running = []

    def start(target, drafter=None, k=3, **options):
        speculative = options.pop("speculative", {})
        if drafter is not None:
            options["speculative_config"] = {"model": str(drafter), "num_speculative_tokens": k} | speculative
        running.append(LLM(model=str(target), **engines.OPTIONS | options))
        return running[-1]

    yield start
    while running:
        running.pop()
    gc.collect()
