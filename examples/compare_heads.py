"""`make compare`: what every kind of draft head accepts, on the tiny target of the demo, in vLLM.

    python examples/compare_heads.py build/demo --json docs/results/acceptance-demo.json

Two drafters are trained alike, one with a dense head and one with a low-rank head. The dense one is then cut down in
every way that there is: to the tokens that a corpus has most often (FR-Spec) or that the target itself answers with
most often (VocabTrim), at two sizes; to a low-rank head by plain SVD, by SVD weighted with the head's real inputs, and
the latter with its best 16 candidates scored again; and with as many candidates as can be served, which is how
SpecVocab drafts. Each answers the same held-out prompts, in an engine of its own.

What is done is kept: stop it when you like and run it again.

Expected output (after `make demo`): a table of acceptance lengths in which plain SVD is
last, re-ranking comes near the dense head and truncation nearer, since this target writes with few of its tokens; every
answer identical to the target's own; and the file above.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import convert_and_serve
import tiny_pair
import tiny_target

from vllm_slimspec.bench import compare
from vllm_slimspec.bench.cli import print_acceptance
from vllm_slimspec.bench.options import claim_results
from vllm_slimspec.bench.results import AcceptanceResults
from vllm_slimspec.console import one_line_errors
from vllm_slimspec.convert import run
from vllm_slimspec.convert.collect import collect
from vllm_slimspec.ops import MAX_K
from vllm_slimspec.train.documents import read_documents
from vllm_slimspec.train.launch import fit
from vllm_slimspec.train.states import write_states

K, PROMPTS, TOKENS = 3, 128, 32
TRIMS = (1024, 512)  # of 4096 tokens: as 32k is to Llama 3's 128k, and with as many bytes as the low-rank head of R=16
RERANK = 16
_CONVERT = sorted(Path(run.__file__).parent.glob("*.py"))


@dataclass(frozen=True)
class Material:
    """What the heads are made of: the demo's target, its hidden states, and prompts that neither model has seen."""

    target: Path
    folder: Path

    @property
    def prompts(self) -> Path:
        return self._once("prompts.jsonl", lambda file: tiny_pair.write_prompts(self.target, file, PROMPTS))

    def training_states(self) -> Path:
        """Of the target, over the documents that drafters learn from."""
        documents = self._once("documents.jsonl", lambda file: tiny_pair.write_documents(self.target, file))
        return self._once(
            "states",
            lambda folder: write_states(
                self.target, read_documents(documents, self.target, 128), folder, dtype="float32"
            ),
        )

    def _once(self, name: str, make: Callable[[Path], Any]) -> Path:
        place = self.folder / name
        key = tiny_pair.hashed([Path(tiny_target.__file__), Path(tiny_pair.__file__)])
        tiny_pair.once(place, key, lambda: make(place))
        return place

    def train(self, head: str) -> Path:
        """A drafter with this head, by the recipe of the demo."""
        place, recipe = self.folder / f"trained-{head}", {**tiny_pair.RECIPE, "head": head}
        states = self.training_states()

        def make() -> None:
            with patch.dict(os.environ):  # speculators sets OMP_NUM_THREADS, which engines would inherit
                fit(self.target, states, place, **recipe)
            shutil.rmtree(place.with_name(f"{place.name}.run"))

        tiny_pair.once(place, tiny_pair.hashed([states.parent / "documents.jsonl"], json.dumps(recipe)), make)
        return place

    def corpus(self) -> Path:
        """What the target was trained on, to count tokens in."""
        file = self.folder / "corpus.jsonl"
        texts = tiny_target.corpus(held_out=False)
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return file

    def states(self, dense: Path) -> Path:
        """The inputs of the dense head while the target answers other prompts than the measured ones."""
        folder = self.folder / "head-states"

        def make() -> None:
            calibration = convert_and_serve.write_calibration(self.folder, self.target)
            collect(self.target, dense, calibration, folder, k=K, max_tokens=TOKENS, engine=convert_and_serve.ENGINE)

        tiny_pair.once(folder, tiny_pair.hashed([dense / "model.safetensors"]), make)
        return folder

    def convert(self, name: str, dense: Path, **options: Any) -> Path:
        """A head made of the dense drafter's, whatever it loses."""
        place = self.folder / name.replace(" ", "-")
        key = tiny_pair.hashed([*_CONVERT, dense / "model.safetensors"], json.dumps(options, default=str))
        made = run.Options(str(dense), place, str(self.target), force=True, **options)
        tiny_pair.once(place, key, lambda: print(f"written: {run.convert(made).checkpoint.path}", file=sys.stderr))
        return place


def make_heads(material: Material) -> Mapping[str, Path]:
    """Name -> drafter, each trained or converted once."""
    dense = material.train("dense")
    heads = {"full": dense, "low-rank trained": material.train("low-rank")}
    states = material.states(dense)
    sources: dict[str, dict[str, Any]] = {
        "corpus": {"prompts": material.corpus()},
        "answers": {"hidden_states": states},
    }
    ways: dict[str, dict[str, Any]] = {
        f"trim-{size} {source}": {"vocab": str(size), "head": "dense", **counted}
        for size in TRIMS
        for source, counted in sources.items()
    }
    weighted = {"hidden_states": states}
    ways |= {
        "spec-vocab": {**weighted, "rerank": MAX_K},
        "low-rank svd": {},
        "low-rank weighted": weighted,
        f"low-rank re-rank {RERANK}": {**weighted, "rerank": RERANK},
    }
    return heads | {name: material.convert(name, dense, **way) for name, way in ways.items()}


def measure(material: Material, heads: Mapping[str, Path]) -> AcceptanceResults:
    """Every head over the held-out prompts, an engine a process; differing answers end it."""
    options = compare.Options(
        target=str(material.target),
        drafters={name: str(drafter) for name, drafter in heads.items()},
        prompts=[material.prompts],
        k=K,
        max_tokens=TOKENS,
        ignore_eos=True,
        engine={"dtype": "float32", "max_model_len": 256, "max_num_seqs": 64, "enforce_eager": True},
        work=material.folder / "answers",
    )
    return compare.measure(options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the demo's: its target is used, or built")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    with claim_results(args.json):
        material = Material(args.folder / "target", args.folder / "compare")
        tiny_pair.build_target(material.target)
        results = measure(material, make_heads(material))
        print_acceptance(results)
        if args.json is not None:
            results.write(args.json)


if __name__ == "__main__":
    with one_line_errors():
        main()
