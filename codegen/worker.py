"""The tuning worker: builds, checks and times kernels in a process that may die.

Run as ``python -P -m structc.codegen.worker MARK_FILE``. One JSON object a line comes in, one goes
out; before each call of a kernel its index is written to the mark file, so that whoever started the
worker knows which kernel killed it.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import struct
import sys
from pathlib import Path
from typing import Any

import torch

from structc.codegen.bench import Bench, Job


def main(arguments: list[str]) -> int:
    """Serve until standard input ends."""
    _die_with_parent()
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not look like a reply
    with Path(arguments[0]).open("r+b") as file, mmap.mmap(file.fileno(), 4) as marks:
        bench = Bench()
        for line in sys.stdin:
            replies.write(json.dumps(_serve(bench, json.loads(line), marks)) + "\n")
    return 0


def _serve(bench: Bench, message: dict[str, Any], marks: mmap.mmap) -> dict[str, Any]:
    match message["do"]:
        case "threads":
            torch.set_num_threads(message["threads"])
            return {"threads": torch.get_num_threads()}
        case "forget":
            bench.forget()
            return {}
        case "check":
            refusal, call_ms = bench.check(Job(**message["job"]))
            if refusal is None:
                return {"call_ms": call_ms}
            return {"code": refusal.code, "reason": refusal.reason}
        case "time":

            def mark(index: int) -> None:
                struct.pack_into("i", marks, 0, index)

            jobs = [Job(**j) for j in message["jobs"]]
            timed = bench.time(jobs, message["rounds"], mark)
            return {"timed": [[t.latency_ms, t.median_ms, t.spread, t.rounds] for t in timed]}
    raise ValueError(f"no such message: {message['do']}")


def _die_with_parent() -> None:
    """A kernel that hangs must not outlive the process that would have killed it (Linux only)."""
    set_death_signal = 1
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(set_death_signal, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
