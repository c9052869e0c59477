"""Peers in processes of their own: started once, then asked in turn; their own RSS."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent.parent
PAUSE = 0.05
"""Seconds between turns, so that a peer's idle threads have stopped spinning."""


class PeerError(Exception):
    """A peer cannot do what it was asked; the text says why."""


class Worker:
    """One peer in its own process.

    Raises:
        PeerError: the process cannot load the peer.
    """

    def __init__(self, peer: str, part: str, cache: Path, threads: int, amx: bool) -> None:
        self.peer = peer
        command = [sys.executable, "-m", "bench_cpu.worker"]
        command += [peer, part, str(cache), str(threads), str(int(amx))]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": str(TOOLS),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        logs = cache / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self.log = logs / f"{peer}-{part}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        self.loaded = self._answer()

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request and its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            cause = signal.Signals(-status).name if status < 0 else f"status {status}"
            raise PeerError(f"the process ended with {cause}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(" ".join(answer["error"].split()))
        return answer


def in_turn(
    workers: dict[str, Worker],
    requests: list[dict[str, Any]],
    rounds: int,
    show: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Ask every worker every request, ``rounds`` times, taking turns; the first round warms up.

    Returns:
        By peer: by request name the median of all seconds ("seconds", "spread": the quartiles),
        and the memory at the end; or "error".
    """
    times: dict[str, dict[str, list[float]]] = {name: {} for name in workers}
    result: dict[str, dict[str, Any]] = {name: {} for name in workers}
    for index in range(rounds + 1):
        for request in requests:
            for name, worker in workers.items():
                if "error" in result[name]:
                    continue
                time.sleep(PAUSE)
                try:
                    seconds = worker.ask(**request)["seconds"]
                except (PeerError, OSError) as error:
                    result[name]["error"] = str(error)
                    continue
                if index:
                    times[name].setdefault(request["name"], []).extend(seconds)
        show(f"round {index} of {rounds}")
    for name, by_request in times.items():
        for request_name, seconds in by_request.items():
            quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
            result[name][request_name] = {
                "seconds": statistics.median(seconds),
                "spread": [quartiles[0], quartiles[2]],
                "count": len(seconds),
            }
        if "error" not in result[name]:
            result[name].update(workers[name].ask(do="memory"))
    return result
