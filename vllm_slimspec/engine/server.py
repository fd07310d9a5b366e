"""A `vllm serve` process on the loopback interface, which is started, waited for and always stopped."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import httpx

from vllm_slimspec.common.process import how_it_ended, last_words, stop
from vllm_slimspec.errors import EngineError


class Server:
    """A ``vllm serve`` process as a context manager.

    Args:
        model: the target.
        arguments: further arguments of ``vllm serve``.
        log: the file that gets the server's output; it is replaced.
        env: variables that are added to the environment.
        timeout: seconds within which the server must answer.

    Raises (on entry):
        EngineError: the server exited, or did not answer in time. No process is left running.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        arguments: Sequence[str] = (),
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        timeout: float = 300,
    ) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.timeout = timeout
        self.env = {**os.environ, **(env or {})}
        self.command = [
            vllm_command(),
            "serve",
            str(model),
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            *arguments,
        ]
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Server":
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            # The new session holds the engine's processes. Ctrl-C does not reach them; __exit__ stops them.
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=self.env, start_new_session=True
            )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the server and everything that it started."""
        if self.process is None:
            return
        stop(self.process)
        self.process = None

    def output(self) -> str:
        """Return what the server has printed so far."""
        return self.log.read_text(errors="replace")

    def _wait(self) -> None:
        deadline = time.monotonic() + self.timeout
        assert self.process is not None
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise EngineError(f"vllm serve {how_it_ended(self.process.returncode)} {last_words(self.log)}")
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.25)
        raise EngineError(f"vllm serve did not answer within {self.timeout:.0f} s {last_words(self.log)}")


def vllm_command() -> str:
    """Return the path of the `vllm` command beside this Python, or else on PATH.

    Raises:
        EngineError: there is no such command.
    """
    found = shutil.which("vllm", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        raise EngineError("no `vllm` command beside this Python; install vLLM into this environment")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
