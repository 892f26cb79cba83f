"""Starts a `llama-server` from the PATH for one GGUF, and stops it."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

from abl_mlx.behaviour.completions import Completions
from abl_mlx.behaviour.endpoint import Endpoint
from abl_mlx.behaviour.llamacpp_process import RESTING, reason
from abl_mlx.eval_choices import Asking
from abl_mlx.models import gguf_template
from abl_mlx.models.given_template import GivenTemplate
from convert.base.errors import UserError

_GUARD = Path(__file__).with_name("guard.py")

#: The longest time that a model may take to load, in seconds.
LOADING = 600.0

#: Context length of each request in tokens, for prompt and reply together.
CONTEXT = 4096


class LlamaServer:
    """A context manager: the server runs inside, on a free port of the loopback interface."""

    def __init__(
        self,
        path: Path,
        asking: Asking,
        program: str | None = None,
        given: GivenTemplate | None = None,
        lora: Path | None = None,
        context: int = CONTEXT,
    ) -> None:
        """
        Args:
            path: the .gguf file; for a split model, the first part.
            asking: how it will be asked; the server gets a slot for each simultaneous request.
            program: the executable; None for the one on the PATH.
            given: a chat template that replaces the file's own.
            lora: an adapter for this file.
            context: the longest prompt and reply of a request together, in tokens.

        Raises:
            UserError: when there is no such program.
        """
        found = program or shutil.which("llama-server")
        if found is None:
            raise UserError("no llama-server is on the PATH: install llama.cpp.")
        self._program = found
        self._path = path
        self._asking = asking
        self._lora, self._context = lora, context
        self._given = given or gguf_template.named_template(path)
        self._process: subprocess.Popen[bytes] | None = None
        #: The server's API and its address, once it runs.
        self.endpoint: Endpoint
        self.address: str

    def __enter__(self) -> LlamaServer:
        template = None
        if self._given is None:
            gguf_template.fault(self._path)  # raises only for a template beyond a limit
        else:
            template = gguf_template.given_template(self._path, self._given)
        port = _free_port()
        slots = self._asking.concurrency
        command = [self._program, "--model", str(self._path)]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        command += ["--ctx-size", str(self._context * slots), "--parallel", str(slots)]
        command += ["--jinja", "--reasoning-format", "none"]
        if template is not None:  # instead of the file's own
            command += ["--chat-template", "chatml"]
        if self._lora is not None:
            command += ["--lora", str(self._lora)]
        self._log = tempfile.TemporaryFile()
        try:
            # The variables LLAMA_ARG_... and LLAMA_API_KEY are meant for servers that users start.
            own = {name: text for name, text in os.environ.items() if name[:6] != "LLAMA_"}
            # The server has its own session, so that Ctrl-C in a terminal only reaches this
            # process; and a guard, so that it ends if this process is killed.
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_GUARD), *command],
                stdin=subprocess.PIPE, stdout=self._log, stderr=self._log, env=RESTING | own,
                start_new_session=True,
            )  # fmt: skip
            self._wait(port)
            self.address = f"http://127.0.0.1:{port}"
            url = f"{self.address}/v1"
            self.endpoint = (
                Endpoint(url, None, self._asking)
                if template is None
                else Completions(url, None, self._asking, template)
            )
        except OSError as error:
            self.stop()
            raise UserError(f"{self._program} cannot be started: {error.strerror}.") from None
        except BaseException:
            self.stop()
            raise
        return self

    def _wait(self, port: int) -> None:
        """Wait until the model is loaded."""
        assert self._process is not None
        end = time.monotonic() + LOADING
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise UserError(
                    f"llama-server cannot load {self._path} (it ended with "
                    f"{self._process.returncode}): {self._said()}"
                )
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            try:
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except (OSError, http.client.HTTPException):
                pass
            finally:
                connection.close()
            time.sleep(0.1)
        raise UserError(f"llama-server did not load {self._path} within {LOADING:.0f} s.")

    def _said(self) -> str:
        """The line of the server's log that gives the reason of a failure."""
        self._log.seek(0)
        return reason(self._log.read().decode(errors="replace")) or "it says nothing."

    def stop(self) -> None:
        """Stop the server; kill it if it does not stop."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
        self._log.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
