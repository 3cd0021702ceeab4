"""The side of the tuning worker that lives: starts it, asks it, kills it, starts it again."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import structc
from structc.codegen.bench import Job
from structc.records import Refusal, Timed

START_LIMIT_S = 60.0
CHECK_LIMIT_S = 120.0
"""A compile has 60 seconds of its own."""
TIME_LIMIT_S = 60.0
"""On top of what the calls are expected to take."""


class WorkerLost(Exception):
    """The worker hung or died; internal to the tuner, which turns it into Refusals."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class Worker:
    """One worker process at a time, with the caller's thread count. A context manager."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        handle, name = tempfile.mkstemp(prefix="structc-mark-")
        os.write(handle, struct.pack("i", -1))
        os.close(handle)
        self._marks = Path(name)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
        self._marks.unlink(missing_ok=True)

    def check(self, job: Job) -> float | Refusal:
        """Milliseconds of one call of a kernel that is right, or why it may not be timed."""
        try:
            reply = self._ask({"do": "check", "job": job.to_json()}, CHECK_LIMIT_S)
        except WorkerLost as lost:
            return Refusal("", job.kernel, lost.code, f"{job.kernel}: {lost.reason}")
        if "code" in reply:
            return Refusal("", job.kernel, reply["code"], reply["reason"])
        return float(reply["call_ms"])

    def time(
        self, jobs: Sequence[Job], rounds: int, expected_s: float
    ) -> list[Timed] | tuple[int, Refusal]:
        """Interleaved timings, or the index of the job that took the worker down, and how."""
        self._mark(-1)
        message = {"do": "time", "jobs": [j.to_json() for j in jobs], "rounds": rounds}
        try:
            reply = self._ask(message, TIME_LIMIT_S + 4 * expected_s)
        except WorkerLost as lost:
            index = struct.unpack("i", self._marks.read_bytes()[:4])[0]
            name = jobs[index].kernel if 0 <= index < len(jobs) else "worker"
            return index, Refusal("", name, lost.code, f"{name}: {lost.reason} while timed")
        return [Timed(*values) for values in reply["timed"]]

    def forget(self) -> None:
        """Let the worker free its inputs: other shapes come next."""
        if self._process is not None:
            with contextlib.suppress(WorkerLost):
                self._ask({"do": "forget"}, START_LIMIT_S)

    def kill(self) -> None:
        """End the worker and whatever it started."""
        process, self._process, self._buffer = self._process, None, b""
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()

    def _mark(self, index: int) -> None:
        with self._marks.open("r+b") as file:
            file.write(struct.pack("i", index))

    def _ask(self, message: dict[str, Any], limit_s: float) -> dict[str, Any]:
        if self._process is None:
            self._start()
        return self._exchange(message, limit_s)

    def _start(self) -> None:
        package = Path(structc.__file__).parents[1]
        paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [sys.executable or "python3", "-P", "-m", "structc.codegen.worker"]
        try:
            self._process = subprocess.Popen(
                [*command, str(self._marks)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,
            )
        except OSError as e:
            raise WorkerLost("WORKER", f"the tuning worker cannot be started: {e}") from None
        try:
            self._exchange({"do": "threads", "threads": torch.get_num_threads()}, START_LIMIT_S)
        except WorkerLost as e:  # no candidate has run: none of them is to blame
            raise WorkerLost("WORKER", f"the tuning worker does not start: it {e}") from None

    def _exchange(self, message: dict[str, Any], limit_s: float) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
            line = self._line(process, time.monotonic() + limit_s)
        except BrokenPipeError:
            line = b""
        except TimeoutError:
            self.kill()
            raise WorkerLost("HANG", f"did not return in {limit_s:g} s") from None
        if not line:
            code = process.wait()
            self.kill()
            raise WorkerLost("CRASHED", f"killed its process ({_death(code)})")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _line(self, process: subprocess.Popen[bytes], deadline: float) -> bytes:
        """The next line of the worker's output; empty if it died, TimeoutError at the deadline."""
        assert process.stdout is not None
        handle = process.stdout.fileno()
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([handle], [], [], left)[0]:
                raise TimeoutError
            got = os.read(handle, 65536)
            if not got:
                return b""
            self._buffer += got
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def _death(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
