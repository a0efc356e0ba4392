"""The processes that share one export: who they are, and what they tell each other.

Process 0 listens at the coordinator's address; the others connect, get a task and hand back a
result. A message is a JSON object on a line. Signs of life go both ways with the work, so a process
that died (its connection closes) or hangs (nothing is heard for `Hosts.seconds`) ends the others
with its name. `jax.distributed` could carry this, too, but where a process dies it aborts the
others amid their work (after up to 100 s), and it makes orbax wait for all wherever one reads.

The port is open to whoever reaches it while an export runs, like that of a JAX coordinator: keep it
inside the pod's network.
"""

import json
import selectors
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from convert.hf_folder import ConvertError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
LIMIT = "MEMPHIS_BARRIER_SECONDS"
_GRACE = 10.0  # s: process 0 gets so much more, for its message, which names the culprit, is first
_PULSE = 1.0  # s between signs of life


@dataclass(frozen=True)
class Hosts:
    """This process among all that run the same command; the default is a process on its own."""

    process: int = 0
    count: int = 1
    address: tuple[str, int] = ("", 0)  # of process 0
    seconds: float = 300.0  # of silence until a process is given up

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Hosts":
        """From JAX's variables and MEMPHIS_BARRIER_SECONDS. Raises ConvertError for bad ones."""
        missing = [name for name in VARIABLES if not environment.get(name)]
        if len(missing) == len(VARIABLES):
            return cls()
        if missing:
            raise ConvertError(
                f"{' and '.join(missing)} not set: several processes need {', '.join(VARIABLES)}, "
                "one process none of them"
            )
        address, *numbers = (environment[name] for name in VARIABLES)
        host, _, port = address.rpartition(":")
        try:
            count, process = map(int, numbers)
            where = (host.strip("[]"), int(port))
            seconds = float(environment.get(LIMIT, cls.seconds))
        except ValueError:
            values = (f"{name}={environment[name]}" for name in VARIABLES)
            raise ConvertError(
                f"{', '.join(values)}, {LIMIT}={environment.get(LIMIT, '300')}: needed are "
                "HOST:PORT, two whole numbers and seconds"
            ) from None
        if not (0 <= process < count and where[0] and seconds > 0):
            raise ConvertError(
                f"JAX_PROCESS_ID={process} of JAX_NUM_PROCESSES={count} at {address}, "
                f"{LIMIT}={seconds:g}: needed are 0 <= id < number, HOST:PORT and a positive time"
            )
        return cls(process, count, where, seconds)

    @property
    def where(self) -> str:
        return ":".join(map(str, self.address))

    def name(self, process: int) -> str:
        return f"process {process} of {self.count}"


ALONE = Hosts()


class Team:
    """Connections to the others: process 0's to all of them, theirs to process 0 alone."""

    def __init__(self, hosts: Hosts):
        self.hosts = hosts
        self.done: dict[int, int] = {}  # steps of work that each peer has done, as last heard
        self._peers: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._unread: dict[int, bytes] = {}
        self._inbox: dict[int, dict[str, Any]] = {}
        self._heard: dict[int, float] = {}
        self._own, self._told = 0, 0.0

    def add(self, process: int, connection: socket.socket, unread: bytes = b"") -> None:
        connection.settimeout(self.hosts.seconds)
        self._selector.register(connection, selectors.EVENT_READ, process)
        self._peers[process] = connection
        self._unread[process], self._inbox[process] = unread, {}
        self._heard[process] = time.monotonic()

    def tell(self, **message: Any) -> None:
        """Sends a message to every peer."""
        self._told = time.monotonic()
        for process, connection in self._peers.items():
            try:
                connection.sendall(_line(message))
            except TimeoutError:
                raise self._silent(process) from None
            except OSError:
                pass  # it left: what it last said, if anything, is still to be read

    def tick(self, done: int) -> None:
        """Between two steps of the work: tells the peers, and stops here if one of them failed."""
        self._own = done
        self._beat(0)

    def wait_for(self, key: str, meanwhile: Callable[[], None] = lambda: None) -> dict[int, Any]:
        """{peer: the value of `key` in its message}, once every peer has sent one."""
        while any(key not in self._inbox[process] for process in self._peers):
            self._beat(_PULSE)
            meanwhile()
        return {process: self._inbox[process].pop(key) for process in self._peers}

    def part(self, **message: Any) -> None:
        """Sends a last message and waits until the peers have left, too, for seconds at most."""
        peers, self._peers = self._peers, {}
        deadline = time.monotonic() + _GRACE
        for connection in peers.values():
            with suppress(OSError):
                connection.sendall(_line(message))
                connection.shutdown(socket.SHUT_WR)
        for connection in peers.values():
            with suppress(OSError):  # closed with unread bytes in it, it would lose the message
                connection.settimeout(max(0.01, deadline - time.monotonic()))
                while connection.recv(1 << 16):
                    pass
            connection.close()

    @contextmanager
    def parting_on_error(self) -> Iterator[None]:
        """An error of the block goes to the peers, and on from here once they have stopped."""
        try:
            yield
        except BaseException as error:
            self.part(error=str(error) or type(error).__name__)
            raise

    def close(self) -> None:
        self._selector.close()
        for connection in self._peers.values():
            connection.close()

    def _beat(self, wait: float) -> None:
        if time.monotonic() - self._told >= _PULSE:
            self.tell(done=self._own)
        for key, _ in self._selector.select(wait) if self._peers else []:
            self._read(key.data)
        for process in self._peers:
            if time.monotonic() - self._heard[process] > self._limit:
                raise self._silent(process)

    def _read(self, process: int) -> None:
        try:
            data = self._peers[process].recv(1 << 20)
        except OSError:
            data = b""
        if not data:
            raise ConvertError(
                f"{self.hosts.name(process)} ended before the export was complete, and nothing "
                "was published: look at its log, then run the command again"
            )
        self._heard[process] = time.monotonic()
        *lines, self._unread[process] = (self._unread[process] + data).split(b"\n")
        for message in map(json.loads, lines):
            if "error" in message:  # what process 0 says names its culprit already
                who = f"{self.hosts.name(process)}: " if process else ""
                raise ConvertError(f"{who}{message['error']}")
            self.done[process] = message.get("done", self.done.get(process, 0))
            self._inbox[process].update(message)

    @property
    def _limit(self) -> float:
        return self.hosts.seconds + (_GRACE if self.hosts.process else 0)

    def _silent(self, process: int) -> ConvertError:
        return ConvertError(
            f"{self.hosts.name(process)} has not been heard of for {self._limit:g} s ({LIMIT}), "
            "and nothing was published: look at its log, then run the command again"
        )


@contextmanager
def team_of(hosts: Hosts, arguments: dict[str, Any]) -> Iterator[Team]:
    """The connected processes; all of them must have been started with the same arguments.

    Raises ConvertError naming who is missing after `hosts.seconds`. An error in the block reaches
    every process.
    """
    team = Team(hosts)
    try:
        with team.parting_on_error():
            hello = {"process": hosts.process, VARIABLES[1]: hosts.count, **arguments}
            if hosts.process:
                team.add(0, _connect(hosts))
                team.tell(hello=hello)
            elif hosts.count > 1:
                _gather(team, hello)
            yield team
    finally:
        team.close()


def _gather(team: Team, own: dict[str, Any]) -> None:
    """Process 0: waits until every other process has said hello."""
    hosts, missing = team.hosts, set(range(1, team.hosts.count))
    deadline = time.monotonic() + hosts.seconds
    misfit = ""
    with _listen(hosts.address[1]) as server:
        while missing:
            try:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                connection, _ = server.accept()
            except TimeoutError:
                raise ConvertError(
                    misfit
                    or f"{' and '.join(map(hosts.name, sorted(missing)))} did not come to "
                    f"{hosts.where} within {hosts.seconds:g} s ({LIMIT}): "
                    "start the same command on every host"
                ) from None
            hello, unread = _hello(connection)
            if hello is None:
                connection.close()  # a stranger: a port scanner, a health check
                continue
            process = hello["process"]
            # A second one of its number is told why, too.
            team.add(process if process in missing else -process, connection, unread)
            if process not in missing:
                raise ConvertError(f"JAX_PROCESS_ID={process} came twice: every process needs one")
            missing.remove(process)
            for key in own.keys() - {"process"}:
                if hello.get(key) != own[key]:
                    theirs = f"process {process} runs with {key}={hello.get(key)}"
                    misfit = misfit or f"{theirs}, process 0 with {key}={own[key]}"
                    # The others are waited for a little longer, so that they hear of it.
                    deadline = min(deadline, time.monotonic() + _GRACE)
    if misfit:
        raise ConvertError(misfit)


def _listen(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise ConvertError(
            f"process 0 cannot listen on port {port} ({error.strerror}): does another run use it? "
            f"Choose another in {VARIABLES[0]}"
        ) from None


def _connect(hosts: Hosts) -> socket.socket:
    """The connection to process 0, which may start later than this one."""
    deadline = time.monotonic() + hosts.seconds
    while True:
        try:
            return socket.create_connection(hosts.address, timeout=5)
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConvertError(
                    f"{hosts.name(0)} does not answer at {hosts.where} within "
                    f"{hosts.seconds:g} s ({LIMIT}): {error}"
                ) from None
            time.sleep(0.1)


def _hello(connection: socket.socket) -> tuple[dict[str, Any] | None, bytes]:
    """(the first message of a process of ours or None, what else it has sent by now)."""
    data = b""
    try:
        connection.settimeout(5)
        while b"\n" not in data and len(data) < 1 << 16:
            if not (more := connection.recv(4096)):
                return None, b""
            data += more
        line, _, rest = data.partition(b"\n")
        hello = json.loads(line)["hello"]
        return (hello, rest) if isinstance(hello["process"], int) else (None, b"")
    except (OSError, ValueError, KeyError, TypeError):
        return None, b""


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"
