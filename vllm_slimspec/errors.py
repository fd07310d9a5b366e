"""The errors that end a command in one line: what is wrong, what is allowed, and how to mend it."""


class SlimSpecError(Exception):
    """Whatever this package refuses or cannot do, in one line.

    What a file holds gets into the message, so characters that move a terminal's cursor are written as escapes, and the
    middle of a very long message is left out.
    """

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        super().__init__(line if len(line) <= 1600 else f"{line[:1000]} ... {line[-500:]}")


class CheckpointError(SlimSpecError, ValueError):
    """A file or a folder that cannot be used: a drafter, a target, prompts, states or results."""


class OptionError(SlimSpecError, ValueError):
    """An option that is not allowed, or that contradicts another one."""


class OutputError(SlimSpecError, ValueError):
    """An output that is taken, that cannot be written, or that another process writes."""


class EngineError(SlimSpecError, ChildProcessError):
    """A process of vLLM, an engine or a server, that did not start or that ended before its time."""
