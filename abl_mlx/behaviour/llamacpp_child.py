"""Runs llama.cpp in its own process, so that a crash there does not end the caller.

`abl_mlx.behaviour.llamacpp_process` runs this file by itself; it imports nothing of this package.
Its settings are a JSON object on the first line of stdin. It answers on stdout with a JSON object:
the address of its server, or an error. llama.cpp's messages go to stderr. The process ends when its
parent does, which holds the other end of stdin.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import sys
import threading
import time
from typing import Any

# The level of llama.cpp's log: errors and warnings.
_WARNINGS = 2

# Seconds that llama.cpp may take over one request.
_DAY = 24 * 3600


def main() -> None:
    """Load the model, print the server's address, and serve until the parent ends."""
    settings = json.loads(sys.stdin.readline())
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _end_with_the_parent()
    sys.path[:] = settings["modules"]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    used = time.process_time()
    resource.setrlimit(resource.RLIMIT_CPU, (int(used + settings["loading"]) + 1, most))
    import xllamacpp

    try:
        server = xllamacpp.Server(_params(xllamacpp, settings))
        # The server's loop starts in another thread; any answer to this call shows that it runs.
        server.handle_metrics()
    except Exception as error:
        time.sleep(0.2)  # another thread writes the log
        answer = {"error": str(error)}
    else:
        answer = {"address": server.listening_address}
    resource.setrlimit(resource.RLIMIT_CPU, (most, most))
    print(json.dumps(answer), file=answers, flush=True)
    threading.Event().wait()


def _params(xllamacpp: Any, settings: dict[str, Any]) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = settings["path"]
    params.n_parallel = settings["n_parallel"]
    params.n_ctx = settings["n_ctx"] * settings["n_parallel"]
    params.kv_unified = False
    params.warmup = False
    params.verbosity = _WARNINGS
    params.use_jinja = True
    params.chat_template = settings["chat_template"]
    params.endpoint_metrics = True
    params.no_extra_bufts = settings["lean"]
    params.timeout_read = params.timeout_write = _DAY
    if settings["lora"] is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(settings["lora"], 1.0)]
    # Replies are to be unchanged, with their thoughts.
    params.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
    if settings["n_threads"] is not None:
        params.cpuparams.n_threads = settings["n_threads"]
        params.cpuparams_batch.n_threads = settings["n_threads"]
    return params


def _end_with_the_parent() -> None:
    """End this process when stdin closes, which means that the parent process has ended."""

    def wait() -> None:
        while os.read(0, 1024):
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
    if sys.platform == "linux":
        # While a model loads, Python's interpreter lock is held, so no Python thread can run. On
        # Linux the kernel therefore sends a signal, whose default action ends the process.
        fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)


if __name__ == "__main__":
    main()
