"""Runs llama.cpp in its own process, so that a crash there does not end the caller.

Started by `abl_mlx.behaviour.llamacpp_process` as a file of its own: it imports nothing of this
package. Its settings are one JSON object on the first line of stdin; it answers with one on stdout,
the address of its server or what went wrong. What llama.cpp prints goes to stderr. It ends with its
parent, which holds the other end of stdin.
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

# Of llama.cpp's log: errors and warnings.
_WARNINGS = 2

# Seconds that llama.cpp may take over one request.
_DAY = 24 * 3600


def main() -> None:
    """Load the model, tell the address, and serve until the parent is gone."""
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
        # Its loop begins in a thread of its own: whatever it answers says that it has begun.
        server.handle_metrics()
    except Exception as error:
        time.sleep(0.2)  # the log is written by a thread of its own
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
    # Replies as the model wrote them, thoughts included.
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
        # Loading holds Python's lock, so that no thread runs. Linux sends a signal, whose default
        # is to end the process.
        fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)


if __name__ == "__main__":
    main()
