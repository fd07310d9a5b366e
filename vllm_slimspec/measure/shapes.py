"""The shapes of draft heads that are measured: hidden size, vocabulary size and rank for public models."""

from typing import NamedTuple


class Shape(NamedTuple):
    """The sizes of a head: D, V and R = D / 8."""

    hidden_size: int
    vocab_size: int
    rank: int


SHAPES = {
    "llama-3.1-8b": Shape(4096, 128256, 512),
    "llama-3.2-1b": Shape(2048, 128256, 256),
    "qwen3-8b": Shape(4096, 151936, 512),
    "qwen3-30b-a3b": Shape(2048, 151936, 256),
    "gpt-oss-20b": Shape(2880, 201088, 360),
}
