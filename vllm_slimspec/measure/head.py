"""``slimspec bench head``: check draft heads, then time them and the memory bandwidth in one run."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from vllm_slimspec.common.device import device_name
from vllm_slimspec.common.progress import progress
from vllm_slimspec.measure.clock import Clock
from vllm_slimspec.measure.results import HeadResults, HeadRow, provenance
from vllm_slimspec.measure.shapes import SHAPES, Head
from vllm_slimspec.measure.timed_heads import Weights, check


def measure(
    shapes: Sequence[str], heads: Sequence[Head], batches: Sequence[int], *, device: torch.device, repeats: int = 21
) -> HeadResults:
    """Check and time every head at every shape and batch in bfloat16, time the memory, and return all results.

    The shapes are names of ``SHAPES``. Heads without a kernel for ``device`` are left out.

    Raises:
        ValueError: a head drafts a wrong token; no results are returned then.
    """
    clock = Clock(device)
    rows: list[HeadRow] = []
    turns = len(shapes) * len(batches) * (repeats + 2)
    with torch.inference_mode(), progress("Timing heads", turns, "turn") as shown:
        # Bandwidth is measured before and after the heads, and the better value counts.
        before = clock.bandwidth()
        for shape in shapes:
            weights = Weights(SHAPES[shape], torch.bfloat16, device)
            arms = [arm for head in heads if (arm := weights.arm(head))]
            for batch in batches:
                hidden = weights.hidden(batch)
                for arm in arms:
                    check(arm, hidden)
                times = clock.measure([partial(arm.run, hidden) for arm in arms], repeats, shown.update)
                for arm, microseconds in zip(arms, times, strict=True):
                    p20, p50, p80 = np.quantile(microseconds, (0.2, 0.5, 0.8), method="nearest").round(2).tolist()
                    rows.append(
                        HeadRow(
                            head=arm.name,
                            shape=shape,
                            batch=batch,
                            dtype="bfloat16",
                            p20_us=p20,
                            p50_us=p50,
                            p80_us=p80,
                            bytes=arm.bytes + batch * arm.bytes_per_row,
                            percent_of_copy_bandwidth=0.0,
                        )
                    )
            del weights, arms
        copy, read = map(max, before, clock.bandwidth())
    for row in rows:
        row.percent_of_copy_bandwidth = round(100 * row.bytes / row.p50_us / 1e3 / copy, 1)
    return HeadResults(
        **provenance(),
        device=device_name(device),
        threads=torch.get_num_threads(),
        repeats=repeats,
        copy_gb_s=round(copy, 2),
        read_gb_s=round(read, 2),
        rows=rows,
    )
