"""A `vllm serve` process on the loopback interface, which is started, waited for and always stopped."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import httpx

from vllm_slimspec.common.cores import keep_apart
from vllm_slimspec.common.process import how_it_ended, last_words, stop
from vllm_slimspec.engine.offline import CACHE
from vllm_slimspec.errors import EngineError


class Server:
    """A ``vllm serve`` process as a context manager.

    Its output replaces the file ``log``. Entering it raises EngineError if the server exits, or does not answer within
    ``timeout`` seconds. No process is left running. On a CPU, the front end is kept off the cores of the workers, and
    ``client_cores`` are those that are left for whoever sends requests.
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
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        # The variable would win over the argument.
        cache = {} if any(argument.startswith("--kv-cache-memory-bytes") for argument in arguments) else CACHE
        self._timeout, self._env = timeout, {**cache, **os.environ, **(env or {})}
        self._command = [vllm_command(), "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *arguments]
        self.process: subprocess.Popen[bytes] | None = None
        self.client_cores: set[int] = set()

    def __enter__(self) -> "Server":
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            # The new session holds the engine's processes. Ctrl-C does not reach them; __exit__ stops them.
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, env=self._env, start_new_session=True
            )
        try:
            self._wait()
            self.client_cores = keep_apart(self.process.pid)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the server and everything that it started."""
        if self.process is not None:
            stop(self.process)
            self.process = None

    def _wait(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + self._timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise EngineError(f"vllm serve {how_it_ended(self.process.returncode)} {last_words(self.log)}")
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.25)
        raise EngineError(f"vllm serve did not answer within {self._timeout:.0f} s {last_words(self.log)}")


def vllm_command() -> str:
    """Return the path of the `vllm` command beside this Python, or else on PATH."""
    found = shutil.which("vllm", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        raise EngineError("no `vllm` command beside this Python; install vLLM into this environment")
    return found
