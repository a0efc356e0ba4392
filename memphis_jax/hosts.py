"""A command that runs on several hosts at once: all start, or none; one lost stops all, by name.

JAX's own service ends a process with a stack trace that names nobody. So the process that was
started on each host only guards: it meets the others over TCP (hosts_hub.py; port of the
coordinator + 1), runs the real command as its child, and says what becomes of it. No jax.

    JAX_COORDINATOR_ADDRESS=10.0.0.2:8476 JAX_NUM_PROCESSES=4 JAX_PROCESS_ID=0..3 memphis train ...

MEMPHIS_BARRIER_SECONDS (300): how long the first waits for the last at the start.
MEMPHIS_HEARTBEAT_SECONDS (60): a host that was not heard of for so long is lost.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from memphis_jax.errors import EXIT_PEER_LOST, EXIT_UNSURE, GUARDED
from memphis_jax.hosts_hub import (
    BEAT,
    GOOD,
    GRACE,
    LAST_WORD,
    Group,
    HostsError,
    Hub,
    advice,
    ending,
)
from memphis_jax.rounds.processes import DIE_WITH_PARENT


def from_environment() -> Group | None:
    """The group that this process belongs to, by JAX's variables; None where it runs alone.

    Raises HostsError naming the variable that is missing or wrong.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    if not address:
        return None
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise HostsError(f"JAX_COORDINATOR_ADDRESS = {address!r} is not HOST:PORT")
    count, index = (_number(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    if not 0 <= index < count:
        raise HostsError(f"JAX_PROCESS_ID = {index} must be from 0 to JAX_NUM_PROCESSES - 1")
    barrier = _number("MEMPHIS_BARRIER_SECONDS", 300)
    heartbeat = _number("MEMPHIS_HEARTBEAT_SECONDS", 60)
    return Group(host.strip("[]"), int(port), count, index, barrier, heartbeat)


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdigit():
        raise HostsError(
            f"{name} = {text!r} must be a whole number: JAX_COORDINATOR_ADDRESS is set"
        )
    return int(text)


def is_guarded() -> bool:
    """Whether this process is the child of a guard."""
    return GUARDED in os.environ


def guard(group: Group, command: Sequence[str]) -> int:
    """Runs `command` on this host once all hosts are here; returns the exit code to end with.

    Its own code where it is 0, 75 (preempted, saved) or an error of its own; 76 where another
    process was lost, which one line on stderr names.
    """
    hub, code = Hub(group) if group.process == 0 else None, EXIT_PEER_LOST
    try:
        code = Member(group).run(command)
        if hub:
            hub.wait()
        return code
    except _Lost as lost:
        print(f"memphis: {lost}", file=sys.stderr, flush=True)
        return EXIT_PEER_LOST
    finally:
        if hub:
            # After an error here the others have a while for their own.
            hub.close(LAST_WORD + (GRACE if code == 1 else 0))


class _Lost(Exception):
    pass


class Member:
    """One host's end of the line to the hub."""

    def __init__(self, group: Group):
        self.group = group
        self._line = _connect(group)
        self._heard = time.monotonic()
        self._lost: str | None = None
        self._blamed, self._gentle = -1, False
        self._finished = False  # process 0: what becomes of its host no longer matters
        self._told = False  # the child has said an error of its own, and waits for its end
        self._go, self._closed = threading.Event(), threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()
        self._say(hello=group.process, host=socket.gethostname())

    def run(self, command: Sequence[str]) -> int:
        while not self._go.wait(BEAT):
            self._check()
        signal.signal(signal.SIGUSR1, self._child_told)
        child = subprocess.Popen(
            command, env={**os.environ, GUARDED: str(os.getpid())}, preexec_fn=DIE_WITH_PARENT
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda sent, _: child.send_signal(sent))
        try:
            while (code := self._wait(child, BEAT)) is None:
                self._check(child)
        except _Lost:
            child.kill()
            child.wait()
            raise
        return self._end(code)

    def _child_told(self, *_: Any) -> None:
        self._told = True

    def _wait(self, child: "subprocess.Popen[bytes]", seconds: float) -> int | None:
        """The child's exit code, 1 once it has said an error; None where it goes on."""
        deadline = time.monotonic() + seconds
        while (code := child.poll()) is None and not self._told and time.monotonic() < deadline:
            time.sleep(BEAT / 10)
        return 1 if code is None and self._told else code

    def _check(self, child: "subprocess.Popen[bytes] | None" = None) -> None:
        """Raises _Lost where the group is broken; a child gets time to end with its own error."""
        self._say(beat=True)
        silent = time.monotonic() - self._heard > self.group.heartbeat
        if silent and not self._lost and not self._finished:
            self._lost = f"process 0 ({self.group.host}) is silent: {advice()}"
        if not self._lost:
            return
        if child and self._gentle and self._wait(child, GRACE) is not None:
            return
        raise _Lost(self._lost)

    def _end(self, code: int) -> int:
        """Reports the child's end; after an end that may be another's fault, waits for a name."""
        good = code in GOOD
        self._say(ended=code, sure=good or code not in (-signal.SIGABRT, EXIT_UNSURE))
        deadline = time.monotonic() + self.group.heartbeat + 2 * GRACE
        while not good and not self._lost and time.monotonic() < deadline:
            self._say(beat=True)
            if self._closed.wait(BEAT):
                break
        if good or code == 1:  # 1: a line of its own said why
            return code
        if code in (-signal.SIGKILL, -signal.SIGTERM) or self._blamed not in (
            -1,
            self.group.process,
        ):
            why = ending(code)
            raise _Lost(self._lost or f"process {self.group.process} {why}: {advice(why)}")
        return 1

    def _say(self, **message: Any) -> None:
        try:
            self._line.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self._hub_gone()

    def _listen(self) -> None:
        try:
            for text in self._line.makefile("r", encoding="utf-8"):
                self._heard, message = time.monotonic(), json.loads(text)
                if "go" in message:
                    self._go.set()
                self._finished |= "finished" in message
                if "lost" in message:
                    self._blamed, self._gentle = message["blamed"], message["gentle"]
                    self._lost = message["lost"]
        except (OSError, ValueError):
            pass
        self._hub_gone()

    def _hub_gone(self) -> None:
        if self._lost is None and not self._finished:
            self._blamed = 0
            self._lost = f"process 0 ({self.group.host}) is gone: {advice()}"
        self._closed.set()


def _connect(group: Group) -> socket.socket:
    deadline = time.monotonic() + group.barrier
    while True:
        try:
            line = socket.create_connection((group.host, group.port + 1), timeout=5)
            line.settimeout(None)
            return line
        except OSError as error:
            if time.monotonic() > deadline:
                raise _Lost(
                    f"process 0 ({group.host}:{group.port + 1}) was not reached within "
                    f"{group.barrier:g} s ({error}): does the command run there, is the port open?"
                ) from None
            time.sleep(BEAT)
