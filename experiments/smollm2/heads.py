"""Every head of the comparison, made of the dense drafter by `slimspec convert`; what is there already is kept.

    python experiments/smollm2/heads.py DENSE_DRAFTER build/smollm2/heads
    python experiments/smollm2/heads.py DENSE_DRAFTER build/smollm2/heads --shifted

No head sees a question of the benchmarks. States are recorded on the prompts of this folder that have no answer there,
because the drafter makes fewer mistakes on the ones that it was trained on. The lists are those of FR-Spec, which
counts tokens in a corpus (here all prompts with their answers), and of VocabTrim, which counts them in the target's own
answers.

With --shifted, the heads of `shifted_ways` are made, from documents without code only. HumanEval, which asks for code,
then shows what they keep on a domain that they were not made for.
"""

import argparse
import gzip
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoTokenizer

from vllm_slimspec.common.progress import steps
from vllm_slimspec.engine.head_states import HeadStates, StatesWriter

FOLDER = Path("build/smollm2")
TARGET = "build/smollm2-135m-instruct"
PROMPTS = Path(__file__).parent / "prompts.jsonl.gz"
ANSWERED, DOCUMENTS = 2560, FOLDER / "answers.jsonl"
LISTS = (32768, 16384, 6144, 2048)  # 6,144 rows of D = 576 are as many bytes as the factors of R = 72
DISTILLED = ["--distill-steps", "400"]
# Exact tokens and rank of the tail. They read 12.5% of the bytes of the dense head (two each), and 6.25% of them.
TIERED = ((4096, 24), (2048, 48), (2048, 12), (1024, 24))
CODE = ("```", "def ", "import ", "return ", "SELECT ", "function ")


def ways(folder: Path) -> dict[str, list[str]]:
    """Name -> what `slimspec convert` is told."""
    # The first one records the states that the others use.
    recorded = ["--hidden-states", str(folder / "weighted.run" / "states")]
    calibration = ["--calibration", str(folder / "calibration.jsonl"), "--max-tokens", "128", "--max-states", "50000"]
    joint = [*DISTILLED, "--joint-steps", "300", "--train-states", str(FOLDER / "states")]
    made = {
        "weighted": calibration,
        "svd": [],
        "spec-vocab": ["--rerank", "2048"],
        "distilled-greedy": [*recorded, *DISTILLED, "--loss", "greedy"],
        "distilled": [*recorded, *DISTILLED],
        "distilled-rerank-64": [*recorded, *DISTILLED, "--rerank", "64"],
        "distilled-rerank-256": [*recorded, *DISTILLED, "--rerank", "256"],
        "distilled-rank-36": [*recorded, *DISTILLED, "--rank", "36"],
        "distilled-rank-144": [*recorded, *DISTILLED, "--rank", "144"],
        "distilled-rank-144-rerank-64": [*recorded, *DISTILLED, "--rank", "144", "--rerank", "64"],
        "distilled-int8": [*recorded, "--quantize", "int8"],
        "distilled-int4": [*recorded, "--quantize", "int4"],
        "distilled-jointly": [*recorded, *joint, "--train-args", json.dumps({"total_seq_len": 1024})],
    }
    for size in LISTS:
        head = ["--vocab", str(size), "--head", "dense"]
        made[f"fr-spec-{size}"] = [*head, "--frequencies", str(folder / "corpus.json")]
        made[f"vocab-trim-{size}"] = [*head, *recorded]
    corpus = ["--frequencies", str(folder / "corpus.json")]
    made["fr-spec-3072"] = ["--vocab", "3072", "--head", "dense", *corpus]
    for exact, rank in TIERED:
        tiered = [*recorded, *corpus, "--exact-tokens", str(exact), "--rank", str(rank)]
        made[f"tiered-{exact}-{rank}"] = tiered
        made[f"tiered-{exact}-{rank}-distilled"] = [*tiered, *DISTILLED]
    return made


def shifted_ways(folder: Path) -> dict[str, list[str]]:
    """Name -> what `slimspec convert` is told, for heads that have seen no code."""
    recorded = ["--hidden-states", str(folder / "prose" / "states")]
    corpus = ["--frequencies", str(folder / "prose" / "corpus.json")]
    made = {"prose-weighted": recorded, "prose-distilled": [*recorded, *DISTILLED]}
    made["prose-distilled-rank-36"] = [*recorded, *DISTILLED, "--rank", "36"]
    for size in (32768, 16384, 6144, 3072):
        made[f"prose-fr-spec-{size}"] = ["--vocab", str(size), "--head", "dense", *corpus]
    for exact, rank in TIERED:
        made[f"prose-tiered-{exact}-{rank}"] = [*recorded, *corpus, "--exact-tokens", str(exact), "--rank", str(rank)]
    return made


def write_prose(folder: Path) -> None:
    """Write what :func:`write_calibration` and the recording wrote, without the documents that hold code."""
    tokenizer = AutoTokenizer.from_pretrained(TARGET)

    def is_prose(tokens: list[int]) -> bool:
        text = tokenizer.decode(tokens)
        return not any(word in text for word in CODE)

    documents = [json.loads(line)["input_ids"] for line in DOCUMENTS.read_text().splitlines()]
    counts = Counter(token for tokens in filter(is_prose, documents) for token in tokens)
    states = HeadStates.open(folder / "weighted.run" / "states")
    writer = StatesWriter(folder / "prose" / "states", {key: states.index[key] for key in ("target", "drafter", "K")})
    kept = {document.number: document for document in states.documents() if is_prose(document.tokens)}
    for group, rows in enumerate(states.read()):
        there = sorted(kept.keys() & set(rows.doc.tolist()))
        writer.write(group, rows[torch.isin(rows.doc, torch.tensor(there))], [kept[number] for number in there])
    writer.finish()
    (folder / "prose" / "corpus.json").write_text(json.dumps(counts))


def write_calibration(folder: Path) -> None:
    """Write the prompts to record states with, and how often each token is in the corpus."""
    documents = [json.loads(line) for line in DOCUMENTS.read_text().splitlines()]
    with gzip.open(PROMPTS, "rt") as prompts:
        (folder / "calibration.jsonl").write_text("".join(list(prompts)[ANSWERED:]))
    counts = Counter(token for document in documents for token in document["input_ids"])
    (folder / "corpus.json").write_text(json.dumps(counts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path, help="the drafter with the target's head")
    parser.add_argument("folder", type=Path, help="where the heads go, a folder for each")
    parser.add_argument("--only", action="append", help="a head to make, in the place of all; repeat the option")
    parser.add_argument("--shifted", action="store_true", help="make the heads that have seen no code")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_calibration(arguments.folder)
    if arguments.shifted and not (arguments.folder / "prose" / "corpus.json").is_file():
        write_prose(arguments.folder)
    every = (shifted_ways if arguments.shifted else ways)(arguments.folder)
    made = {name: way for name, way in every.items() if name in (arguments.only or [name])}
    missing = {name: way for name, way in made.items() if not (arguments.folder / name).exists()}
    for name, way in steps(missing.items(), "Heads", len(missing), "head"):
        alike, _, reranked = name.partition("-rerank-")
        if reranked and (done := arguments.folder / f"{alike}.run").is_dir():
            # Re-ranking changes nothing in a distillation, so the finished one is taken.
            shutil.copytree(done, arguments.folder / f"{name}.run", dirs_exist_ok=True)
        # Its factors are there already, and only stored in fewer bits.
        drafter = arguments.folder / "distilled" if "--quantize" in way else arguments.dense
        command = [sys.executable, "-m", "vllm_slimspec", "convert", str(drafter), "--target", TARGET]
        subprocess.run([*command, "--output-path", str(arguments.folder / name), "--force", *way], check=True)


if __name__ == "__main__":
    main()
