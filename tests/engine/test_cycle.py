"""`benchmarks/cycle.py` in one real engine: heads take each other's place, and each cycle asks the one that is in."""

import gc

import pytest
import torch
from cycle_toy import CONFIG, SHAPE

import cycle
from cycle_engine import Engine, Plan, measure
from engine_heads import HEADS, heads_of
from random_pairs import write_drafter, write_target
from vllm_slimspec.head.slot import HeadSlot
from vllm_slimspec.measure.shapes import SHAPES, TRIMMED
from vllm_slimspec.measure.timed_heads import trimmed_offsets

pytestmark = pytest.mark.broad

K = 3


def _plan(work, drafter, heads, **speculative):
    return Plan(
        target=str(write_target(work / "target", CONFIG)),
        drafter=str(write_drafter(work, CONFIG, SHAPE.rank, HEADS[drafter])),
        heads=heads,
        rank=SHAPE.rank,
        num_speculative_tokens=K,
        batches=[1, 2],
        contexts=[24],
        rounds=1,
        cycles=2,
        repeats=3,
        device="cpu",
        speculative=speculative,
    )


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """An engine that has run its plan."""
    engine = Engine(_plan(tmp_path_factory.mktemp("cycle"), "full", heads_of("cpu")))
    ticks = []
    yield engine, measure(engine, lambda: ticks.append(1)), len(ticks)
    del engine
    gc.collect()


def _worker(engine):
    return engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def test_every_head_has_its_row(running, monkeypatch):
    """Catches: a head left out, an engine that ran fewer turns than it announced, parts that are not those of a
    cycle."""
    engine, found, ticks = running
    monkeypatch.setitem(SHAPES, "toy", SHAPE)
    assert ticks == engine.plan.ticks
    rows = cycle.rows_of("toy", SHAPE.rank, K, [found])
    assert [(row.head, row.batch) for row in rows] == [(h, b) for b in (1, 2) for h in heads_of("cpu")]
    for row in rows:
        assert row.cycles == 2
        assert row.accepted < 0.5  # random weights: a cycle gives one token
        assert min(row.verify_ms, row.body_ms) > 0
        assert row.cycle_ms_p20 <= row.cycle_ms_p50 <= row.cycle_ms_p80


@pytest.mark.parametrize("head", heads_of("cpu"))
def test_the_drafter_asks_the_head_that_is_in(running, head):
    """Catches: an exchange that leaves the last head in, and rows that differ by noise alone."""
    engine, _, _ = running
    worker = _worker(engine)
    hidden = torch.randn(2, SHAPE.hidden_size, generator=torch.Generator().manual_seed(7)).bfloat16()
    asked = []
    heads = worker._slimspec_heads
    before = heads[head]
    heads[head] = before._replace(call=lambda hidden: asked.append(head) or before.call(hidden))
    try:
        engine.ask("slimspec_use", head)
        with torch.inference_mode():
            ids = worker.model_runner.drafter._greedy_sample(hidden)
            assert torch.equal(ids, before.draft(hidden))
        with engine.requests(1, 24):
            asked.clear()
            engine.turn(head, 1, 24)
            assert len(asked) == K * (engine.plan.cycles + 1)
    finally:
        heads[head] = before
    assert ids.dtype == torch.int64
    if head == "null":
        assert not ids.any()
    if HEADS[head].rows:
        targets = torch.arange(TRIMMED) + trimmed_offsets(TRIMMED, SHAPE.vocab_size)
        assert torch.isin(ids, targets).all()


def test_a_wrong_head_is_not_timed(running, monkeypatch):
    """Catches: a faster head that drafts something else."""
    engine, _, _ = running
    right = HeadSlot.top_tokens
    monkeypatch.setattr(HeadSlot, "top_tokens", lambda self, hidden: right(self, hidden) + 1)
    with pytest.raises(ValueError, match="low-rank-int8 is wrong at batch 2"):
        engine.ask("slimspec_make", ["null", "full", "low-rank-int8"], SHAPE.rank, [2])
    monkeypatch.undo()
    with pytest.raises(ValueError, match="head full-fp8 has no kernel for cpu"):
        engine.ask("slimspec_make", ["full-fp8"], SHAPE.rank, [2])


def test_a_rival_in_a_folder_of_its_own(tmp_path):
    """Catches: what a GPU's engines load: an architecture that no worker knows, a rival whose head is never asked."""
    from cycle_worker import RivalDraft
    from vllm_slimspec.measure.timed_heads import check

    engine = Engine(_plan(tmp_path, "spec-vocab", ["spec-vocab"], use_local_argmax_reduction=True))
    drafter = _worker(engine).model_runner.drafter.model
    assert type(drafter) is RivalDraft
    with engine.requests(2, 24):
        assert len(engine.turn("spec-vocab", 2, 24).ms) == engine.plan.cycles
    check(drafter._head.reference, torch.randn(2, SHAPE.hidden_size).bfloat16())
    asked = []
    drafter._head = drafter._head._replace(call=lambda hidden, call=drafter._head.call: asked.append(1) or call(hidden))
    with engine.requests(1, 24):
        asked.clear()
        engine.turn("spec-vocab", 1, 24)
    assert len(asked) == K * (engine.plan.cycles + 1)
    engine.ask("slimspec_own", "spec-vocab")
    assert len(engine.ask("slimspec_time", 2, 3)["spec-vocab"]) == 3
