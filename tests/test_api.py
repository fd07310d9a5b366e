"""docs/api.md: its example runs, and it names everything that is public."""

import re
from pathlib import Path

from vllm_slimspec import errors, ops

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "api.md").read_text()


def test_example_of_docs_api_runs():
    """Catches: an example in docs/api.md that fails when a reader copies it."""
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(compile(example, "docs/api.md", "exec"), {})


def test_docs_api_names_every_public_operation_and_error():
    """Catches: a public operation or error that docs/api.md does not mention, so that nobody can find it."""
    internal = {
        "PackedFactor",
        "reduce_pairs",
        "resolve_impl",
    }  # what `pack` returns, and two that only our layer calls
    public = set(ops.__all__) - internal
    public |= {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert [name for name in sorted(public) if name not in PAGE] == []
