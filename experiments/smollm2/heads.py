"""Every head of the comparison, made of the dense drafter by `slimspec convert`; what is there already is kept.

    python experiments/smollm2/heads.py DENSE_DRAFTER build/smollm2/heads

No head sees a question of the benchmarks. States are recorded on the prompts of this folder that have no answer there,
because the drafter makes fewer mistakes on the ones that it was trained on. The lists are those of FR-Spec, which
counts tokens in a corpus (here all prompts with their answers), and of VocabTrim, which counts them in the target's own
answers.
"""

import argparse
import gzip
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from vllm_slimspec.common.progress import steps

FOLDER = Path("build/smollm2")
TARGET = "build/smollm2-135m-instruct"
PROMPTS = Path(__file__).parent / "prompts.jsonl.gz"
ANSWERED, DOCUMENTS = 2560, FOLDER / "answers.jsonl"
LISTS = (32768, 16384, 6144, 2048)  # 6,144 rows of D = 576 are as many bytes as the factors of R = 72
DISTILLED = ["--distill-steps", "400"]


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
    return made


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
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_calibration(arguments.folder)
    made = {name: way for name, way in ways(arguments.folder).items() if name in (arguments.only or [name])}
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
