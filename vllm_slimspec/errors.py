"""The errors of this package. Their messages are one line: what is wrong, what is allowed, and how to fix it."""


class SlimSpecError(Exception):
    """The base of all errors of this package, with a message of one line.

    A message may quote the content of a file. So characters that move a terminal's cursor are written as escapes, and
    the middle of a very long message is left out.
    """

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        super().__init__(line if len(line) <= 1600 else f"{line[:1000]} ... {line[-500:]}")


class CheckpointError(SlimSpecError, ValueError):
    """A file or a folder that cannot be used: a drafter, a target, prompts, states or results."""


class OptionError(SlimSpecError, ValueError):
    """An option that is not allowed, or that contradicts another one."""


class OutputError(SlimSpecError, ValueError):
    """An output that already exists, that cannot be written, or that another process is writing."""


class EngineError(SlimSpecError, ChildProcessError):
    """A vLLM engine or server that did not start, or that ended too early."""
