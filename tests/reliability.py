"""The tables of docs/reliability.md, out of the JSON that the commands beside them wrote.

python tests/reliability.py
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "reliability.md"
RESULTS = ROOT / "docs" / "results"


def hostile(result: dict[str, Any]) -> list[str]:
    """Mutated checkpoints."""
    counts: dict[str, list[int]] = {}
    for row in result["rows"]:
        several = " + " in row["mutation"]
        count = counts.setdefault("two of them" if several else row["mutation"], [0, 0])
        count[0] += row["accepted"]
        count[1] += row["refused"]
    rows = [f"| {name} | {accepted:,} | {refused:,} |" for name, (accepted, refused) in counts.items()]
    return [
        f"{result['cases']:,} mutated folders in {result['seconds']:.0f} s, {result['findings']} findings.",
        "",
        "| what was mutated | accepted: the damage does not matter | refused in one line |",
        "|---|---|---|",
        *rows,
    ]


def soak(result: dict[str, Any]) -> list[str]:
    """The server under load."""
    requests = sum(result["requests"].values())
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(result["requests"].items(), key=lambda kn: -kn[1]))
    memory = [
        f"| memory of the {name.strip()} process | {m['start']:,.0f} MB, at the end {m['end']:,.0f} MB; "
        f"slope of the second half {m['slope_per_minute']:+.2f} MB a minute |"
        for name, m in result["memory"].items()
    ]
    return [
        "| | |",
        "|---|---|",
        f"| vLLM, duration, clients at once | {result['versions']['vllm']}, {result['seconds']:.0f} s, "
        f"{result['clients']} |",
        f"| requests served | {requests:,}: {kinds} |",
        f"| tokens compared with the target's own | {result['tokens']:,} |",
        f"| wrong answers | {result['wrong']} |",
        f"| requests that got an error | {result['errors']} |",
        f"| near ties (gap below 1e-4) | {result['near_ties']} |",
        f"| preemptions | {result['preemptions']:,} |",
        f"| tokens found in the prefix cache | {result['prefix_cache_hits']:,} |",
        f"| acceptance length | {result['acceptance_length']:.2f} |",
        *memory,
        f"| requests left in the server at the end | {result['left_running']} |",
        f"| processes left after it | {result['left_processes']} |",
    ]


def versions(result: dict[str, Any]) -> list[str]:
    """vLLM versions, and how each was tested."""
    out = ["| vLLM | how | tests passed | failed | skipped | command |", "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        command = f"`make test-compat VLLM={row['vllm']}`"
        counts = [sum(file[key] for file in row["files"]) for key in ("passed", "failed", "skipped")]
        numbers = " | ".join(map(str, counts)) if row["files"] else f"{row['symbols']} symbols found | 0 | "
        how = "engines" if row["files"] else f"static: {row['why_static']}"
        out.append(f"| {row['vllm']} | {how} | {numbers} | {command} |")
    return out


def dist(result: dict[str, Any]) -> list[str]:
    """What a wheel brings along."""
    rows = [f"| {r['dependency']} | {r['version']} | {r['licence']} |" for r in result["rows"]]
    return ["| package | version | licence |", "|---|---|---|", *rows]


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "hostile": hostile,
    "soak": soak,
    "versions": versions,
    "dist": dist,
}


def render(text: str) -> str:
    """The document with every table as its JSON has it."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        file = RESULTS / f"{name}.json"
        lines = table(json.loads(file.read_text())) if file.is_file() else ["Not measured yet: run the command above."]
        text = "\n".join([f"{head}{begin}", *lines, f"{end}{tail}"])
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(render(DOCUMENT.read_text()))
