"""The one error that bad input ends in."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: one line, with what is wrong, what is allowed and how to mend it.

    What a checkpoint holds gets into the message, so characters that move a terminal's cursor are written as escapes,
    and the middle of a very long message is left out.
    """

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        super().__init__(line if len(line) <= 1600 else f"{line[:1000]} ... {line[-500:]}")
