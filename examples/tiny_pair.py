"""The tiny target of tiny_target.py and a SlimSpec drafter for it, trained with vllm_slimspec.train: four CPU minutes.

    python examples/tiny_pair.py build/tiny
    vllm serve build/tiny/target --dtype float32 \
        --speculative-config '{"model": "build/tiny/drafter", "num_speculative_tokens": 3}'

Three steps, the same for a real target: let it answer prompts (a drafter is judged on what its target writes, not on
what people wrote), keep its hidden states over those answers, fit the drafter to them. A second run does nothing.
"""

import argparse
import hashlib
import json
import platform
import random
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_target
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import vllm_slimspec
from vllm_slimspec.progress import steps
from vllm_slimspec.train.documents import read_documents
from vllm_slimspec.train.launch import fit
from vllm_slimspec.train.states import write_states

PROMPT_TOKENS, ANSWER_TOKENS = 48, 80
DOCUMENTS = 2000  # of 128 tokens each, half of them corpus and half the target's answers
# Far from the paper's recipe, which is for billions of tokens: Muon and large steps get this one there in 230 steps.
RECIPE: dict[str, Any] = {
    "epochs": 1,
    "optimizer": "muon",
    "muon_lr": 0.02,
    "muon_weight_decay": 0.0,
    "muon_adjust_lr_fn": "original",
    "lr": 8e-3,
    "scheduler_warmup_steps": 5,
    "total_seq_len": 1024,
    "ttt_step_loss_decay": 0.8,
}
_PACKAGE = Path(vllm_slimspec.__file__).parent
_SOURCES = [Path(__file__), *sorted((_PACKAGE / "train").glob("*.py")), _PACKAGE / "convert" / "factorise.py"]


@dataclass(frozen=True)
class Pair:
    """Two checkpoint folders, and prompts from files that neither model has seen."""

    target: Path
    drafter: Path
    prompts: list[str]


def build(folder: Path) -> Pair:
    """Train whatever is not there yet: ``target/``, ``drafter/`` and ``prompts.jsonl`` in ``folder``."""
    target, drafter, prompts = folder / "target", folder / "drafter", folder / "prompts.jsonl"
    key = build_target(target)
    once(prompts, key, lambda: write_prompts(target, prompts))
    once(drafter, key, lambda: train_drafter(target, drafter))
    return Pair(target, drafter, read_prompts(prompts))


def build_target(target: Path) -> str:
    """Train the target if it is not there yet.

    Returns:
        A hash of everything that it, and what is trained with it, is made from.
    """
    key = hashed([Path(tiny_target.__file__)], platform.python_version())
    once(target, key, lambda: tiny_target.build(target))
    return hashed(_SOURCES, key)


def write_prompts(target: Path, file: Path, count: int = 64) -> None:
    """Stretches of 48 tokens from the held-out files, as text."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    ids = tiny_target.encode(tokenizer, tiny_target.corpus(held_out=True))
    texts = (tokenizer.decode(window) for window in tiny_target.windows(ids, len(ids), PROMPT_TOKENS, seed=1))
    whole = (
        text for text in texts if len(tokenizer(text)["input_ids"]) == PROMPT_TOKENS and tiny_target.EOS not in text
    )
    file.write_text("".join(json.dumps({"prompt": next(whole)}) + "\n" for _ in range(count)))


def read_prompts(file: Path) -> list[str]:
    """The prompts that ``write_prompts`` wrote."""
    return [json.loads(line)["prompt"] for line in file.read_text().splitlines()]


def write_documents(target: Path, file: Path) -> None:
    """What the drafter learns from: corpus, and the target's own answers to the beginnings of more of it."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    ids = tiny_target.encode(tokenizer, tiny_target.corpus(held_out=False))
    pieces = torch.stack(list(tiny_target.windows(ids, DOCUMENTS, PROMPT_TOKENS + ANSWER_TOKENS, seed=2)))
    half = DOCUMENTS // 2
    documents = [*pieces[:half].tolist(), *answers(target, pieces[half:, :PROMPT_TOKENS])]
    random.Random(0).shuffle(documents)  # the last tenth is what speculators validates on
    file.write_text("".join(json.dumps({"input_ids": document}) + "\n" for document in documents))


@torch.inference_mode()
def answers(target: Path, prompts: torch.Tensor) -> list[list[int]]:
    """Prompts [N, T] with the greedy continuation of each."""
    model = AutoModelForCausalLM.from_pretrained(target)
    model.generation_config.eos_token_id = None  # all of one length
    written: list[list[int]] = []
    batches = prompts.split(250)
    for batch in steps(batches, "Answers of the target", len(batches), "batch"):
        mask = torch.ones_like(batch)
        written += model.generate(batch, attention_mask=mask, do_sample=False, max_new_tokens=ANSWER_TOKENS).tolist()
    return written


def train_drafter(target: Path, drafter: Path) -> None:
    """Hidden states of the target over the documents, and one epoch on them."""
    work = drafter.with_name("work")  # half a gigabyte, gone in the end
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    write_documents(target, work / "documents.jsonl")
    documents = read_documents(work / "documents.jsonl", target, max_length=128)
    write_states(target, documents, work / "states", dtype="float32")  # as the target is served
    fit(target, work / "states", work / "drafter", **RECIPE)
    (work / "drafter").rename(drafter)
    shutil.rmtree(work)


def once(place: Path, key: str, make: Callable[[], None]) -> None:
    """Make ``place``, unless it was made from the same inputs before."""
    made_from = place.with_name(f".{place.name}.made-from")
    if place.exists() and made_from.exists() and made_from.read_text() == key:
        return
    made_from.unlink(missing_ok=True)
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    make()
    made_from.write_text(key)


def hashed(files: Iterable[Path], *more: str) -> str:
    """SHA-256 of these files and strings."""
    return hashlib.sha256(b"\0".join([file.read_bytes() for file in files] + [m.encode() for m in more])).hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(build(parser.parse_args().folder))
