"""speculators has few switches; what it has no switch for is replaced for the length of a run, by name."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(place: Any, **values: Any) -> Iterator[None]:
    """Within it, these attributes of a module or class have other values.

    Raises:
        AttributeError: ``place`` has no such attribute: another version, and what was replaced is elsewhere now.
    """
    before = {name: getattr(place, name) for name in values}
    try:
        for name, value in values.items():
            setattr(place, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(place, name, value)
