"""Where the guards of a group (hosts.py) meet: process 0 hears all, and tells who is lost. No jax.

Lines of JSON over TCP. A guard says `hello`, `beat`, and `ended` with its child's exit code; the
hub says `go`, `beat`, `lost` with the name of a process, and `finished` when process 0 is done.
Lost is what failed, or is silent and has not ended; one host may well end long after another.
"""

import contextlib
import json
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from memphis_jax.errors import EXIT_PREEMPTED

BEAT = 0.5  # seconds between signs of life
LAST_WORD = 2.0  # seconds for the others to hear that one is lost
GRACE = 10.0  # seconds for a process to end by itself when another ended with an error
GOOD = (0, EXIT_PREEMPTED)  # exit codes of a child that is done


class HostsError(ValueError):
    """Variables of the environment that do not describe a group of processes."""


class Group(NamedTuple):
    host: str  # of process 0
    port: int  # JAX's; ours is the next
    processes: int
    process: int
    barrier: float  # seconds
    heartbeat: float  # seconds


def advice(why: str = "") -> str:
    told = "all processes stop; the same command goes on from the last checkpoint"
    if why.endswith("signal 9"):
        told += " (signal 9 is most often for lack of memory: 'dmesg' there tells)"
    return told


def ending(code: int) -> str:
    """What a child's exit code, as Popen has it, says to a user."""
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


@dataclass
class _Peer:
    line: socket.socket
    host: str
    heard: float = field(default_factory=time.monotonic)
    ended: bool = False
    open: bool = True


class Hub:
    """Where process 0 meets all processes, itself too, and tells them who is missing."""

    def __init__(self, group: Group):
        self.group = group
        self._peers: dict[int, _Peer] = {}
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._doubt: tuple[float, int, str] | None = None  # an end that may be another's fault
        self._went = self._over = False
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        try:
            self._server = socket.create_server(
                ("", group.port + 1), family=family, dualstack_ipv6=family == socket.AF_INET6
            )
        except OSError as error:
            raise HostsError(
                f"port {group.port + 1} (JAX_COORDINATOR_ADDRESS + 1) cannot be used: {error}"
            ) from None
        threading.Thread(target=self._accept, daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()

    def wait(self) -> None:
        """Returns once the others, who listen to this process, have ended, or one is lost."""
        patience, told = time.monotonic() + GRACE, False
        while not self._over and (behind := self._behind()):
            if time.monotonic() > patience and not told:
                who = self._names(behind)
                print(f"memphis: done here; waiting for {who}", file=sys.stderr, flush=True)
                told = True
            time.sleep(BEAT / 5)

    def close(self, patience: float) -> None:
        """Lets what is being said reach all, who close their lines when they have heard it."""
        with self._lock:
            self._over = True
        deadline = time.monotonic() + patience
        while any(peer.open for peer in self._others()) and time.monotonic() < deadline:
            time.sleep(BEAT / 10)
        self._server.close()

    def _others(self) -> list[_Peer]:
        return [peer for index, peer in self._peers.items() if index != self.group.process]

    def _behind(self) -> list[int]:
        with self._lock:
            return [index for index, peer in sorted(self._peers.items()) if not peer.ended]

    def _accept(self) -> None:
        while not self._over:
            try:
                line, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(line,), daemon=True).start()

    def _serve(self, line: socket.socket) -> None:
        index = -1
        try:
            for text in line.makefile("r", encoding="utf-8"):
                message = json.loads(text)
                if "hello" in message:
                    index = message["hello"]
                    self._arrive(index, _Peer(line, message["host"]))
                if index < 0:
                    return  # none of ours
                self._peers[index].heard = time.monotonic()
                if "ended" in message:
                    self._end(index, message["ended"], message["sure"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        if index < 0:
            return
        self._peers[index].open = False
        if not self._peers[index].ended:
            self._tell_lost([index], "its connection closed: killed, or its host is gone")

    def _arrive(self, index: int, peer: _Peer) -> None:
        with self._lock:
            self._peers[index] = peer
            if len(self._peers) == self.group.processes and not self._went:
                self._went = True
                self._tell(go=True)

    def _end(self, index: int, code: int, sure: bool) -> None:
        self._peers[index].ended = True
        if code in GOOD:
            if index == 0:
                with self._lock:
                    self._tell(finished=True)
            return
        why = ending(code)
        if sure:
            self._tell_lost([index], why, gentle=code > 0)
        elif self._doubt is None:
            self._doubt = (time.monotonic(), index, why)

    def _watch(self) -> None:
        while not self._over:
            time.sleep(BEAT)
            now, group = time.monotonic(), self.group
            if not self._went:
                if now - self._started > group.barrier:
                    missing = sorted(set(range(group.processes)) - self._peers.keys())
                    self._tell_lost(missing, f"did not arrive within {group.barrier:g} s")
                with self._lock:
                    self._tell(beat=True)
                continue
            for index, peer in list(self._peers.items()):
                if not peer.ended and now - peer.heard > group.heartbeat:
                    self._tell_lost([index], f"was not heard of for {group.heartbeat:g} s")
            if self._doubt and now - self._doubt[0] > group.heartbeat:
                self._tell_lost([self._doubt[1]], self._doubt[2])
            with self._lock:
                self._tell(beat=True)

    def _tell_lost(self, indices: list[int], why: str, gentle: bool = False) -> None:
        with self._lock:
            if self._over:
                return
            self._over = True
            text = f"{self._names(indices)} {why}: {advice(why)}"
            self._tell(lost=text, blamed=indices[0], gentle=gentle)

    def _names(self, indices: list[int]) -> str:
        return " and ".join(
            f"process {i} of {self.group.processes}"
            + (f" ({self._peers[i].host})" if i in self._peers else "")
            for i in indices
        )

    def _tell(self, **message: Any) -> None:
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.line.sendall(json.dumps(message).encode() + b"\n")
