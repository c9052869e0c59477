"""The process of one peer: reads a request a line, answers a line.

python -m bench_cpu.worker PEER PART CACHE THREADS AMX
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from bench_cpu.peers import PEERS, missing
from bench_cpu.without_amx import refuse_amx


def memory_kib(field: str) -> int:
    """VmRSS or VmHWM of this process in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    return 0


def timed(peer: Any, request: dict[str, Any]) -> list[float]:
    """Seconds of what is asked: one number, or one for each step of decoding or each repeat."""
    if request["do"] == "decode":
        peer.prefill(request["tokens"])
        seconds = []
        for _ in range(request["steps"]):
            start = time.perf_counter()
            peer.decode()
            seconds.append(time.perf_counter() - start)
        return seconds
    if request["do"] == "prefill":
        calls: Any = lambda: peer.prefill(request["tokens"])  # noqa: E731
    elif request["do"] == "linear":
        calls = peer.linear(request)
    else:
        calls = getattr(peer, request["do"])
    seconds = []
    for _ in range(request.get("repeat", 1)):
        start = time.perf_counter()
        calls()
        seconds.append((time.perf_counter() - start) / request.get("copies", 1))
    return seconds


def main() -> None:
    """Load the peer, then serve."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    name, part, cache, threads, amx = sys.argv[1:]
    if not int(amx):
        refuse_amx()
    row = PEERS[name]
    os.environ.update(row.environment)
    reason = missing(name)
    if reason:
        return answer(error=reason)
    try:
        module = importlib.import_module(row.module)
        before = memory_kib("VmRSS")
        peer = module.open_peer(name, part, Path(cache), int(threads))
        answer(loaded=True, notes=getattr(peer, "notes", {}))
    except Exception as error:  # noqa: BLE001  (any failure of a peer is a row of the report)
        return answer(error=f"{type(error).__name__}: {str(error)[:300]}")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "memory":
                answer(import_mb=before / 1024, peak_mb=memory_kib("VmHWM") / 1024)
            else:
                answer(seconds=timed(peer, request))
        except Exception as error:  # noqa: BLE001
            answer(error=f"{type(error).__name__}: {str(error)[:300]}")
    return None


if __name__ == "__main__":
    main()
