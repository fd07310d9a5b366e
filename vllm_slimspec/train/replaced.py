"""Replace attributes of speculators for the length of a run, where it has no switch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(place: Any, **values: Any) -> Iterator[None]:
    """Give attributes of a module or class other values while the context is open.

    Args:
        place: the module or class.
        values: the new values, by the names of the attributes.

    Raises:
        AttributeError: ``place`` has no such attribute, because another version of the library has moved it.
    """
    before = {name: getattr(place, name) for name in values}
    try:
        for name, value in values.items():
            setattr(place, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(place, name, value)
