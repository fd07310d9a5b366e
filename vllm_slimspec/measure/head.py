"""``slimspec bench head``: check draft heads, then time them and the memory bandwidth in one run."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from vllm_slimspec.common.device import device_name
from vllm_slimspec.measure.arms import Head, Weights, check
from vllm_slimspec.measure.clock import Clock, quantile
from vllm_slimspec.measure.results import HeadResults, HeadRow, provenance
from vllm_slimspec.measure.shapes import SHAPES


def measure(
    shapes: Sequence[str],
    heads: Sequence[Head],
    batches: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 21,
    tick: Callable[[], None] = lambda: None,
) -> HeadResults:
    """Check and time every head at every shape and batch, time the memory, and return all results.

    Args:
        shapes: names of ``SHAPES``.
        heads: heads to time; those without a kernel for ``device`` are left out.
        batches: numbers of rows of a call.
        device: where the heads run.
        dtype: of the weights and the hidden states.
        repeats: timed calls of each head.
        tick: called after every turn of timing.

    Raises:
        ValueError: a head drafts a wrong token; no results are returned then.
    """
    clock = Clock(device)
    # Bandwidth is measured before and after the heads, and the better value counts.
    before = clock.bandwidth()
    rows: list[HeadRow] = []
    with torch.inference_mode():
        for shape in shapes:
            weights = Weights(SHAPES[shape], dtype, device)
            arms = [arm for head in heads if (arm := weights.arm(head))]
            for batch in batches:
                hidden = weights.hidden(batch)
                for arm in arms:
                    check(arm, hidden)
                times = clock.measure([partial(arm.run, hidden) for arm in arms], repeats, tick)
                for arm, microseconds in zip(arms, times, strict=True):
                    p20, p50, p80 = (quantile(microseconds, q) for q in (0.2, 0.5, 0.8))
                    size = arm.bytes + batch * arm.bytes_per_row
                    rows.append(
                        HeadRow(
                            head=arm.name,
                            shape=shape,
                            batch=batch,
                            dtype=str(dtype).removeprefix("torch."),
                            p20_us=round(p20, 2),
                            p50_us=round(p50, 2),
                            p80_us=round(p80, 2),
                            bytes=size,
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
