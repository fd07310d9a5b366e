"""Make results of `slimspec bench acceptance` with given rates, for tests of what is computed from them."""

from vllm_slimspec.measure.results import AcceptanceResults, AcceptanceRow


def acceptance(*sets: dict[str, list[float]]) -> AcceptanceResults:
    """Rates at each position by head, of one prompt set after another, each with three times the cycles of the one
    before; and all again at temperature 1, where nothing was accepted."""
    rows = [
        AcceptanceRow(
            head=head,
            prompt_set=f"set {number}",
            temperature=temperature,
            num_speculative_tokens=len(rates),
            rank=None,
            draft_vocab_size=9,
            rerank=None,
            head_bytes=1,
            dense_bytes=1,
            length=1 + sum(rates),
            low=1,
            high=4,
            per_position=rates if temperature == 0 else [0.0] * len(rates),
            cycles=[5 * 3**number] * 2,
            accepted=[1, 1],
            tokens=9,
            equal=None,
            near_ties=None,
            largest_gap=None,
        )
        for number, one in enumerate(sets)
        for temperature in (0, 1)
        for head, rates in one.items()
    ]
    return AcceptanceResults(
        command="",
        time="2026-01-01T00:00:00Z",
        versions={},
        device="one CPU",
        target="the-target",
        hidden_size=1,
        vocab_size=1,
        dtype="float32",
        max_tokens=9,
        rows=rows,
    )
