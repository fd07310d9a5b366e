"""Write the figures in README.md and docs/ from the JSON files of the commands that measured them.

    python tools/documents.py        (`make documents`)

A figure stands between ``<!-- name: begin -->`` and ``<!-- name: end -->``. A test checks that none was changed by
hand.
"""

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from vllm_slimspec.common.walk import acceptance_length, accepted_share

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
# The heads that the README shows, in the words of its readers. The other heads stay in the JSON.
HEADS = {
    "null": "no head at all: the floor",
    "full": "full vocabulary, vLLM's own",
    "full-int8": "full vocabulary in int8",
    "trim-32k-scatter": "32k tokens, as vLLM ships it",
    "trim-32k": "32k tokens, `use_local_argmax_reduction`",
    "spec-vocab": "SpecVocab, k = 2048",
    "low-rank": "**low-rank**",
    "low-rank-rerank": "**low-rank, 16 scored again**",
    "low-rank-int8": "**low-rank, int8**",
    "low-rank-int8-rerank": "**low-rank, int8, 16 scored again**",
    "low-rank-int4": "**low-rank, int4**",
}


# The heads of R = D/8 for which docs/smollm2.md says where they lose drafts.
LOST = ("weighted", "distilled", "distilled, 64 scored again", "trained")


def claim(result: dict[str, Any]) -> list[str]:
    """Return the sentence of the README that compares the low-rank heads with the repacked dense head at batch 1."""
    found = {
        (row["shape"], row["head"]): row["p50_us"]
        for row in result["rows"]
        if row["batch"] == 1 and row["head"] in ("full-packed", "low-rank", "low-rank-int8")
    }

    def faster(shape: str, head: str) -> str:
        return f"{found[shape, 'full-packed'] / found[shape, head]:.1f}x"

    eight, one = "llama-3.1-8b", "llama-3.2-1b"
    return [
        f"On {result['threads']} CPU cores, at the shapes of Llama-3.1-8B and batch 1, the low-rank head drafts "
        f"a token **{faster(eight, 'low-rank')}** as fast as the dense",
        f"one, with `up` in int8 **{faster(eight, 'low-rank-int8')}**; at the shapes of Llama-3.2-1B "
        f"{faster(one, 'low-rank')} and {faster(one, 'low-rank-int8')}.",
    ]


def cycle(result: dict[str, Any]) -> list[str]:
    """Return the table of whole cycles at the first K, with columns for each batch size."""
    k = result["rows"][0]["num_speculative_tokens"]
    rows = {
        (r["head"], r["batch"]): r
        for r in result["rows"]
        if (r["num_speculative_tokens"], r["dtype"]) == (k, "bfloat16")
    }
    batches = sorted({batch for _, batch in rows})
    columns = [f"batch {b}, ms (p20 to p80) | x full (95%) | eq. 4" for b in batches]
    lines = [f"| draft head, K = {k} | {' | '.join(columns)} |", "|---" * (1 + 3 * len(batches)) + "|"]
    for head, words in HEADS.items():
        cells = []
        for batch in batches:
            row = rows[head, batch]
            cells += [
                f"{row['cycle_ms_p50']:.0f} ({row['cycle_ms_p20']:.0f} to {row['cycle_ms_p80']:.0f})",
                f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})",
                "" if row["predicted_ratio"] is None else f"{row['predicted_ratio']:.2f}",
            ]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return lines


def cycles(result: dict[str, Any]) -> list[str]:
    """Return the tables of all cycles, compared with the full head, with vLLM's trimmed head and with eq. 4."""
    lines = []
    measured = [r for r in result["rows"] if r["dtype"] == "bfloat16"]
    for k, batch in dict.fromkeys((r["num_speculative_tokens"], r["batch"]) for r in measured):
        rows = {r["head"]: r for r in measured if (r["num_speculative_tokens"], r["batch"]) == (k, batch)}
        shipped = rows["trim-32k-scatter"]["cycle_ms_p50"]
        lines += [
            "",
            f"K = {k}, batch {batch}, kappa {rows['full']['kappa']:.3f}:",
            "",
            "| head | cycle ms | K heads ms | alone ms | x full (95%) | x trim-32k-scatter | eq. 4 | off |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for head, row in rows.items():
            predicted = row["predicted_ratio"]
            eq4 = f"{predicted:.3f} | {row['ratio'] / predicted - 1:+.1%}" if predicted else " | "
            lines.append(
                f"| {head} | {row['cycle_ms_p50']:.1f} | {row['head_ms']:.1f} | {row['head_alone_us_p50'] / 1e3:.2f} "
                f"| {row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f}) "
                f"| {row['cycle_ms_p50'] / shipped:.3f} | {eq4} |"
            )
    return lines


def states(result: dict[str, Any]) -> list[str]:
    """Return a table for each K: the acceptance of every head on all prompt sets together, and on each of them."""
    lines: list[str] = []
    sets = list(dict.fromkeys(row["prompt_set"] for row in result["rows"]))
    for k in dict.fromkeys(row["num_speculative_tokens"] for row in result["rows"]):
        rows = {(r["head"], r["prompt_set"]): r for r in result["rows"] if r["num_speculative_tokens"] == k}
        lines += [
            "",
            f"K = {k}:",
            "",
            f"| head | MB read | length (95%) | accepted of dense (95%) | {' | '.join(sets[:-1])} | alpha |",
            "|---" * (5 + len(sets[:-1])) + "|",
        ]
        for head in dict.fromkeys(head for head, _ in rows):
            row = rows[head, sets[-1]]
            low, high = row["accepted_of_full_low"], row["accepted_of_full_high"]
            share = f"{row['accepted_of_full']:.1%} ({low:.1%} to {high:.1%})"
            length = f"{row['length']:.3f} ({row['low']:.2f} to {row['high']:.2f})"
            each = " | ".join(f"{rows[head, s]['length']:.2f}" for s in sets[:-1])
            size, alpha = row["head_bytes"] / 1e6, sum(row["alpha"]) / k
            lines.append(f"| {head} | {size:.2f} | {length} | {share} | {each} | {alpha:.3f} |")
    prompts = len(result["rows"][-1]["cycles"])
    return [*lines[1:], "", f"{prompts} prompts, {result['max_tokens']} tokens an answer.", *_lost(result)]


def _lost(result: dict[str, Any]) -> list[str]:
    """Return the table of where low-rank heads lose drafts: accepted at each position, relative to the dense head's."""
    k = max(row["num_speculative_tokens"] for row in result["rows"])
    rows = {(r["head"], r["prompt_set"]): r for r in result["rows"] if r["num_speculative_tokens"] == k}
    sets = list(dict.fromkeys(name for _, name in rows))[:-1]
    lines = [
        "",
        f"Where drafts are lost: the share of cycles that accept a draft at a position, of that of `full`, K = {k}.",
        "",
        f"| head | prompts | {' | '.join(map(str, range(1, k + 1)))} |",
        "|---" * (2 + k) + "|",
    ]
    most = []
    for head in LOST:
        shares = {
            (name, i + 1): rate / rows["full", name]["per_position"][i]
            for name in sets
            for i, rate in enumerate(rows[head, name]["per_position"])
        }
        for name in sets:
            cells = " | ".join(f"{shares[name, i]:.0%}" for i in range(1, k + 1))
            lines.append(f"| {head} | {name} | {cells} |")
        worst = min(sets, key=lambda name: shares[name, 1])
        most.append(f"`{head}` on {worst} ({1 - shares[worst, 1]:.1%})")
    return [*lines, "", f"At the first position the heads lose the most drafts on these prompts: {'; '.join(most)}."]


BUDGETS = (0.0625, 0.125)  # shares of the dense head's bytes at which heads are compared
_SLACK = 1.05  # a head may read so many times the budget, because re-ranked rows come on top


def tiered(result: dict[str, Any]) -> list[str]:
    """Return the table that compares the best tiered heads with the best list and the best uniform head of their bytes.

    Of the tiered heads it shows the best of each kind: distilled or not, and re-ranked or not.
    """
    rows = {(r["num_speculative_tokens"], r["head"]): r for r in result["rows"]}  # the last row of each: over all sets
    lines = [
        "| K | of the bytes | head | MB read | accepted of dense (95%) | of the best list | of the best uniform |",
        "|---|---|---|---|---|---|---|",
    ]
    for k, budget in product(sorted(_ks(result)), BUDGETS):
        dense = rows[k, "full"]
        shares = {
            head: row["head_bytes"] / dense["head_bytes"] / budget for (one, head), row in rows.items() if one == k
        }
        there = [rows[k, head] for head, share in shares.items() if _SLACK / 2 < share < _SLACK]
        ours = [row for row in there if "tiered" in row["head"]]
        kinds: dict[tuple[bool, ...], list[dict[str, Any]]] = defaultdict(list)  # by what was done to the head
        for row in ours:
            kinds[tuple(word in row["head"] for word in ("distilled", "scored again"))].append(row)
        lists = _most_accepted([row for row in there if "fr-spec" in row["head"]])
        uniform = _most_accepted([row for row in there if row not in ours and "fr-spec" not in row["head"]])
        for row in (lists, uniform, *map(_most_accepted, kinds.values())):
            against = " | ".join(_kept_of(row, other) for other in (dense, lists, uniform))
            lines.append(f"| {k} | {budget:.2%} | {row['head']} | {row['head_bytes'] / 1e6:.2f} | {against} |")
    return lines


def elsewhere(result: dict[str, Any]) -> list[str]:
    """Return the table of heads on a domain that they were not made for, at an eighth of the dense bytes."""
    rows = [row for row in result["rows"] if row["num_speculative_tokens"] == min(_ks(result))]
    dense = next(row for row in rows if row["head"] == "full")
    there = [row for row in rows if 0.5 < row["head_bytes"] / dense["head_bytes"] / BUDGETS[-1] < _SLACK]
    of = {word: [row for row in there if word in row["head"]] for word in ("fr-spec", "tiered")}
    known = [*of["fr-spec"], *of["tiered"]]
    words = {
        "FR-Spec's list of the most frequent tokens": of["fr-spec"],
        "**SlimSpec, low-rank and re-ranked**": [row for row in there if row not in known],
        "**SlimSpec, tiered and re-ranked**": of["tiered"],
    }
    lines = ["| head | MB read | accepted of the dense head's drafts (95%) |", "|---|---|---|"]
    for what, members in words.items():
        best = _most_accepted(members)
        lines.append(f"| {what} | {best['head_bytes'] / 1e6:.1f} | {_kept_of(best, dense)} |")
    return lines


def _ks(result: dict[str, Any]) -> set[int]:
    return {row["num_speculative_tokens"] for row in result["rows"]}


def _most_accepted(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return max(rows, key=lambda row: row["accepted_of_full"])


def _kept_of(row: dict[str, Any], other: dict[str, Any]) -> str:
    """Return a row's accepted drafts per cycle divided by those of another row over the same prompts."""
    if row is other:
        return "1"
    share = accepted_share(*(np.stack([one["cycles"], one["accepted"]], axis=1) for one in (row, other)))
    return f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"


def acceptance(result: dict[str, Any]) -> list[str]:
    """Return the table of acceptance lengths in the engine, with the number of answers that are the target's own."""
    k = result["rows"][0]["num_speculative_tokens"]
    lines = [f"| head | prompts | length (95%) | accepted at 1 to {k} | identical answers |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        rates = " ".join(f"{rate:.2f}" for rate in row["per_position"])
        near = f" ({row['near_ties']} near ties)" if row["near_ties"] else ""
        lines.append(
            f"| {row['head']} | {row['prompt_set']} | {row['length']:.3f} ({row['low']:.2f} to {row['high']:.2f}) "
            f"| {rates} | {row['equal']} of {len(row['cycles'])}{near} |"
        )
    return [*lines, *_kept(result)]


def _kept(result: dict[str, Any]) -> list[str]:
    """Return the table of accepted drafts per cycle over all prompt sets together, relative to the dense head's."""
    counts: dict[str, list[np.ndarray]] = defaultdict(list)  # head -> cycles and accepted drafts of each prompt
    for row in result["rows"]:
        counts[row["head"]].append(np.stack([row["cycles"], row["accepted"]], axis=1))
    joined = {head: np.concatenate(parts) for head, parts in counts.items()}
    sizes = {row["head"]: row["head_bytes"] / 1e6 for row in result["rows"]}
    lines = ["", "All prompts together:", ""]
    lines += ["| head | MB read | length (95%) | accepted of dense (95%) |", "|---|---|---|---|"]
    for head, one in joined.items():
        length, share = acceptance_length(one), accepted_share(one, joined["full"])
        lines.append(
            f"| {head} | {sizes[head]:.2f} | {length.value:.3f} ({length.low:.2f} to {length.high:.2f}) "
            f"| {share.value:.1%} ({share.low:.1%} to {share.high:.1%}) |"
        )
    return lines


def card(head: str) -> Callable[[dict[str, Any]], list[str]]:
    """Return the function that makes the table of a model card: the acceptance of one head in the engine."""

    def lines_of(result: dict[str, Any]) -> list[str]:
        rows = [row for row in result["rows"] if row["head"] == head]
        if not rows:
            return ["Not measured yet."]
        k = rows[0]["num_speculative_tokens"]
        lines = [
            f"| prompts | acceptance length, K = {k} (95%) | accepted at 1 to {k} | identical |",
            "|---|---|---|---|",
        ]
        for row in rows:
            rates = " ".join(f"{rate:.2f}" for rate in row["per_position"])
            near = f" ({row['near_ties']} near ties)" if row["near_ties"] else ""
            length = f"{row['length']:.3f} ({row['low']:.2f} to {row['high']:.2f})"
            same = f"{row['equal']} of {len(row['cycles'])}{near}"
            lines.append(f"| {row['prompt_set']} | {length} | {rates} | {same} |")
        dtype, tokens = result["dtype"], result["max_tokens"]
        read, dense = (rows[0][name] / 1e6 for name in ("head_bytes", "dense_bytes"))
        return [
            *lines,
            "",
            f"vLLM {result['versions']['vllm']} in {dtype}, up to {tokens} tokens an answer. A draft step reads "
            f"{read:.1f} MB of the head; a dense one has {dense:.1f} MB.",
        ]

    return lines_of


def served(result: dict[str, Any]) -> list[str]:
    """Return the table of throughput, times and acceptance behind a server for each head."""
    lines = [
        "| data type | at once | head | tokens/s | of no drafter | TTFT ms | ITL ms | TPOT ms | acceptance length |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    alone = {(r["dtype"], r["concurrency"]): r["rounds_tokens_per_s"] for r in result["rows"] if r["head"] == "none"}
    for row in sorted(result["rows"], key=lambda row: (row["dtype"], row["concurrency"])):
        length = f"{row['length']:.2f}" if row["length"] else ""
        times = " | ".join(f"{row[name]:.1f}" for name in ("ttft_ms_p50", "itl_ms_p50", "tpot_ms_p50"))
        ratio = _times(row["rounds_tokens_per_s"], alone[row["dtype"], row["concurrency"]])
        where = f"{row['dtype']} | {row['concurrency']} | {row['head']}"
        lines.append(f"| {where} | {row['tokens_per_s']:.1f} | {ratio} | {times} | {length} |")
    failed = sum(row["failed"] for row in result["rows"])
    for dtype in dict.fromkeys(row["dtype"] for row in result["rows"]):
        lines += ["", *_fastest([r for r in result["rows"] if (r["dtype"], r["concurrency"]) == (dtype, 1)], dtype)]
    return [*lines, "", f"{failed} of {sum(row['completed'] for row in result['rows']) + failed:,} requests failed."]


# What the first screen of README.md compares: words -> how the names of the rows begin of which the fastest is shown.
FIRST = {
    "no drafter": "none",
    "EAGLE-3 drafter with a dense head": "full",
    "the same drafter with the best trimmed head": "trim-",
    "the same drafter with SpecVocab's head": "spec-vocab",
    "**the same drafter with a SlimSpec head**": "slimspec",
    "**a drafter trained with a SlimSpec head**": "trained",
}


def first_screen(result: dict[str, Any]) -> list[str]:
    """Return the table of one request at a time, in the dtype in which the target alone is fastest."""
    rows = [row for row in result["rows"] if row["concurrency"] == 1]
    alone = max((row for row in rows if row["head"] == "none"), key=lambda row: row["tokens_per_s"])
    lines = ["| | row | tokens per second | times those of no drafter | acceptance length |", "|---|---|---|---|---|"]
    for words, start in FIRST.items():
        those = [row for row in rows if row["head"].startswith(start) and row["dtype"] == alone["dtype"]]
        row = max(those, key=lambda row: row["tokens_per_s"])
        length = f"{row['length']:.2f}" if row["length"] else ""
        times = _times(row["rounds_tokens_per_s"], alone["rounds_tokens_per_s"]) if row is not alone else ""
        lines.append(f"| {words} | {row['head']} | {row['tokens_per_s']:.1f} | {times} | {length} |")
    rounds = len(alone["rounds_tokens_per_s"])
    return [
        *lines,
        "",
        f"One request at a time, {alone['dtype']}, on {result['device']}. The servers took turns in {rounds} rounds.",
        *_fastest([row for row in rows if row["dtype"] == alone["dtype"]], alone["dtype"]),
    ]


def _fastest(rows: list[dict[str, Any]], dtype: str) -> list[str]:
    """Return the sentences that compare the fastest row of SlimSpec with the others, at one request at a time."""
    speeds = {row["head"]: row["tokens_per_s"] for row in rows}
    rounds = {row["head"]: row["rounds_tokens_per_s"] for row in rows}
    ours = [head for head in speeds if head == "trained" or head.startswith("slimspec")]
    best, rival = (max(heads, key=speeds.__getitem__) for heads in (ours, speeds.keys() - {*ours}))

    def times(other: str) -> str:
        return _times(rounds[best], rounds[other])

    return [
        f"At one request at a time, in {dtype}, the fastest row of SlimSpec is `{best}`. It has {times(rival)} times",
        f"the tokens per second of `{rival}`, the fastest of the other rows, {times('full')} times those of the dense",
        f"head, and {times('none')} times those of no drafter. Each is the median of the rounds, with the lowest and",
        "the highest.",
    ]


def _times(ours: list[float], others: list[float]) -> str:
    """Return the median ratio of rounds that took turns, with the lowest and the highest one."""
    ratios = sorted(a / b for a, b in zip(ours, others, strict=True))
    return f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


RUN_WORDS = {
    "probe-adamw-1e-3": "AdamW, learning rate 1e-3",
    "probe-adamw-2e-3": "AdamW, learning rate 2e-3",
    "probe-muon": "Muon at 0.02, AdamW at 2e-3 for the rest",
    "probe-150-steps": "the recipe",
    "probe-from-target": "the recipe, from the target's last layer",
    "dense": "the dense drafter",
    "low-rank": "the drafter with the low-rank head",
}


def runs(result: dict[str, Any]) -> list[str]:
    """Return the table of what every training run measured on held-out answers, epoch by epoch."""
    found = {row["run"]: row for row in result["rows"]}
    lines = [
        "| run | steps | loss, trained on | loss, held out | acceptance length, K = 3 (95%) |",
        "|---|---|---|---|---|",
    ]
    for name, words in RUN_WORDS.items():
        if (row := found.get(name)) is None:
            continue
        for i, steps in enumerate(row["steps"]):
            length = f"{row['length'][i]:.2f} ({row['low'][i]:.2f} to {row['high'][i]:.2f})"
            losses = f"{row['train_loss'][i]:.2f} | {row['loss'][i]:.2f}"
            lines.append(f"| {words if i == 0 else ''} | {steps:,} | {losses} | {length} |")
    return lines


def real_size(result: dict[str, Any]) -> list[str]:
    """Return the sentence about a conversion at the size of an 8B model."""
    (row,) = result["rows"]
    return [
        f"D = {row['D']}, V = {row['V']:,}, R = {row['R']}, bfloat16, {row['states']:,} states, on {result['device']}: "
        f"{row['minutes']:.1f} minutes and",
        f"{row['peak_gib']:.1f} GiB at most, measuring included.",
    ]


def demo(result: dict[str, Any]) -> list[str]:
    """Return the table of what `make demo` measured."""
    head, speed = result["head"], result["tokens_per_second"]
    rates = " ".join(f"{rate:.2f}" for rate in result["acceptance_per_position"])
    return [
        "| | |",
        "|---|---|",
        f"| answers equal to the target's own | {'all' if result['greedy_identical'] else 'NOT all'} "
        f"of {result['questions']} |",
        f"| tokens per second, the target alone | {speed['none']:.1f} |",
        f"| tokens per second with the drafter | {speed['slimspec']:.1f} ({speed['slimspec'] / speed['none']:.2f}x) |",
        f"| acceptance length, K = {result['num_speculative_tokens']} "
        f"| {result['acceptance_length']:.2f} tokens a cycle |",
        f"| accepted at position 1, 2, ... | {rates} |",
        f"| draft head | rank {head['rank']}, {head['bytes'] / 1e6:.1f} MB "
        f"in place of {head['dense_bytes'] / 1e6:.1f} MB |",
        f"| fused path | {'yes' if result['fused_path'] else 'no'} ({result['impl']}) |",
    ]


def hostile(result: dict[str, Any]) -> list[str]:
    """Return the table of mutated checkpoints, by what was mutated."""
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
    """Return the table of the server under load."""
    requests = sum(result["requests"].values())
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(result["requests"].items(), key=lambda kn: -kn[1]))
    memory = [
        f"| memory of the {name} process{words} | {m['start']:,.0f} MB, at the end {m['end']:,.0f} MB; "
        f"slope of the second half {m['slope_per_minute']:+.2f} MB a minute |"
        for words, of in (("", "memory"), (", target alone", "memory_alone"))
        for name, m in result[of].items()
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


def faults(result: dict[str, Any]) -> list[str]:
    """Return the table of the faults that were injected on purpose."""
    rows = []
    for row in result["rows"]:
        tests = " ".join(f"`{file}`" for file in row["files"])
        rows.append(f"| {row['fault']} | {row['injected']:,} | {row['answers'] or ''} | {tests} |")
    return [
        f"{sum(row['injected'] for row in result['rows']):,} faults in {result['passed']} tests that passed, "
        f"{len(result['failed'])} that failed.",
        "",
        "| fault | injected | answers compared afterwards | tests |",
        "|---|---|---|---|",
        *rows,
    ]


def versions(result: dict[str, Any]) -> list[str]:
    """Return the table of vLLM versions and of how each was tested."""
    out = ["| vLLM | how | tests passed | failed | skipped | command |", "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        command = f"`make test-compat VLLM={row['vllm']}`"
        counts = [sum(file[key] for file in row["files"]) for key in ("passed", "failed", "skipped")]
        numbers = " | ".join(map(str, counts)) if row["files"] else f"{row['symbols']} symbols found | 0 | "
        how = "engines" if row["files"] else f"static: {row['why_static']}"
        out.append(f"| {row['vllm']} | {how} | {numbers} | {command} |")
    return out


def dist(result: dict[str, Any]) -> list[str]:
    """Return the table of the packages that the wheel installs, with their licenses."""
    rows = [f"| {r['dependency']} | {r['version']} | {r['license']} |" for r in result["rows"]]
    return ["| package | version | license |", "|---|---|---|", *rows]


DOCUMENTS: dict[str, dict[str, tuple[str, Callable[[dict[str, Any]], list[str]]]]] = {
    "README.md": {
        "claim": ("head-cpu", claim),
        "cycle": ("cycle-k5-b1-cpu", cycle),
        "demo": ("demo", demo),
        "first": ("smollm2-serve", first_screen),
        "elsewhere": ("smollm2-shifted", elsewhere),
    },
    "docs/bench.md": {
        "cycles": ("cycle-cpu", cycles),
        "again": ("cycle-k5-b1-cpu", cycles),
    },
    "docs/smollm2.md": {
        "states": ("smollm2-states", states),
        "acceptance": ("smollm2-acceptance", acceptance),
        "served": ("smollm2-serve", served),
        "cycles": ("smollm2-cycle", cycles),
        "tiered": ("smollm2-tiered", tiered),
        "shifted": ("smollm2-shifted", tiered),
    },
    "experiments/smollm2/README.md": {"runs": ("smollm2-runs", runs)},
    "examples/smollm2-135m-instruct/README.md": {"card": ("smollm2-acceptance", card("slimspec"))},
    "examples/smollm2-135m-instruct-dense/README.md": {"card": ("smollm2-acceptance", card("full"))},
    "docs/convert.md": {
        "real-size": ("convert-8b", real_size),
    },
    "docs/reliability.md": {
        "hostile": ("hostile", hostile),
        "soak": ("soak", soak),
        "faults": ("faults", faults),
        "versions": ("versions", versions),
        "dist": ("dist", dist),
    },
}
"""Document -> name of a figure -> its file in docs/results, and the function that makes its lines."""


def render(document: str, text: str) -> str:
    """Return the text of a document with every figure made anew from its JSON file.

    Raises:
        ValueError: the document has no place for a figure.
    """
    for name, (result, lines_of) in DOCUMENTS[document].items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin not in text or end not in text:
            raise ValueError(f"{document}: no place for the figure {name}: add {begin} and {end}")
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        file = RESULTS / f"{result}.json"
        lines = lines_of(json.loads(file.read_text())) if file.is_file() else ["Not measured yet."]
        text = "\n".join([f"{head}{begin}", *lines, f"{end}{tail}"])
    return text


def roofline() -> str:
    """Return the whole text of docs/roofline.md, as the command that the page names prints it."""
    command = [sys.executable, "benchmarks/roofline.py", "docs/results/head-cpu.json"]
    command += ["--parts", "docs/results/head-parts-cpu.json"]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    for document in DOCUMENTS:
        file = ROOT / document
        file.write_text(render(document, file.read_text()))
    (ROOT / "docs" / "roofline.md").write_text(roofline())


if __name__ == "__main__":
    main()
