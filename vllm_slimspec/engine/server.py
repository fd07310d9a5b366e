"""A `vllm serve` of one's own: started on loopback, waited for, and never left behind."""

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
    """``vllm serve`` as a context manager.

    Args:
        model: the target.
        arguments: further arguments of ``vllm serve``.
        log: where its output goes; replaced.
        env: added to the environment.
        timeout: seconds until it must answer.

    Raises (on entry):
        EngineError: it exited, or did not answer in time. Nothing keeps running.
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
            # A session of its own: the engine's processes are in it, and Ctrl-C reaches them through __exit__ only.
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
        """What it has printed so far."""
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
    """The `vllm` beside this Python, or the one on PATH.

    Raises:
        EngineError: neither is there.
    """
    found = shutil.which("vllm", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        raise EngineError("no `vllm` command beside this Python; install vLLM into this environment")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
