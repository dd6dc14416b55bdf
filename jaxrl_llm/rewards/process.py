"""The parent's side of a reward worker: one child process and the socket to it."""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from multiprocessing.connection import Connection
from typing import Any

from jaxrl_llm.rewards.worker import MARK, kill_marked

_TICK = 0.05  # seconds between looks at whether a silent worker still lives
_STUCK = 20  # seconds that one message may take to pass through the socket
_BOOT = """
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from jaxrl_llm.rewards.worker import main
main()
"""


class WorkerProcess:
    """A child process in a session of its own, and the socket to it."""

    def __init__(self) -> None:
        self._marker = uuid.uuid4().hex
        ours, theirs = socket.socketpair()
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", _STUCK, 0))
        environment = {
            "OMP_NUM_THREADS": "1",  # numpy's threads reserve address space, which counts as memory
            "OPENBLAS_NUM_THREADS": "1",
            **os.environ,
            "JAX_PLATFORMS": "cpu",  # the accelerator is the trainer's
            MARK: self._marker,
        }
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, str(theirs.fileno()), json.dumps(sys.path)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=environment,
            )
        self._connection = Connection(ours.detach())

    def alive(self) -> bool:
        """Whether the process itself still runs."""
        return self.process.poll() is None

    def send(self, pickled: bytes) -> None:
        """Send a pickled message. Raises OSError if the process has ended or does not listen."""
        self._connection.send_bytes(pickled)

    def receive(self, until: float, stop: threading.Event) -> Any:
        """The next message. TimeoutError at the time `until`; EOFError if the process or the pool ended."""
        while not self._connection.poll(max(0.0, min(_TICK, until - time.monotonic()))):
            if stop.is_set() or not (self.alive() or self._connection.poll(0)):
                raise EOFError
            if time.monotonic() >= until:
                raise TimeoutError
        return self._connection.recv()

    def kill(self) -> None:
        """End the process and every process that it started."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        kill_marked(self._marker)
        self._connection.close()
