"""A cloud in a folder: its state, and TPU workers that are folders and processes of this machine.

    FOLDER/state.json            queued resources, nodes, buckets, what to deny
    FOLDER/buckets/NAME/         the objects
    FOLDER/nodes/NODE/wN/        a worker's home; it goes with its node
    FOLDER/calls.jsonl           every call of gcloud

A test makes a `Cloud`; the programs in bin/ find it by FAKE_CLOUD. `preempt`, `pause`,
`cut` and `stalled` are back doors of the test.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HOSTS = {"v5litepod": 4, "v6e": 4, "v4": 8, "v5p": 8}  # what an accelerator type counts, per host
KEY = "FAKE_WORKER"  # in the environment of all that runs on a worker: FOLDER:NODE:WORKER


class Cloud:
    def __init__(self, folder: Path):
        self.folder = folder
        self.stalled = folder / "stalled"  # while it exists, what workers print stays under way

    @classmethod
    def make(cls, folder: Path, environment: dict[str, str] | None = None) -> "Cloud":
        """A new one: an account, a project, a zone, the bucket gs://bucket, no TPU."""
        folder.mkdir(parents=True)
        cloud = cls(folder)
        state = {
            "account": "me@example.com",
            "properties": {"project": "my-project", "compute/zone": "us-east5-b"},
            "types": ["v4-8", "v4-16", "v5litepod-8", "v5litepod-16", "v6e-8", "v6e-16"],
            "zones": ["us-east5-b"],
            "requests": {},
            "nodes": {},
            "buckets": {},
            "environment": environment or {},  # of every worker, as its image has it
            "deny": {},  # command: message
            "pause": "",  # a command that takes effect only once this is another
            "queue": [],  # states that a new request goes through before ACTIVE
            "seconds_of_grace": 0.0,  # between SIGTERM and SIGKILL of a preempted worker
        }
        cloud._write(state)
        cloud.add_bucket("bucket")
        return cloud

    # ---------------------------------------------------------------- the state

    @contextlib.contextmanager
    def state(self) -> Iterator[dict[str, Any]]:
        """The state, locked; written back unless the block raises."""
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = json.loads((self.folder / "state.json").read_text())
            yield state
            self._write(state)

    def _write(self, state: dict[str, Any]) -> None:
        partial = self.folder / "state.tmp"
        partial.write_text(json.dumps(state, indent=1))
        partial.rename(self.folder / "state.json")

    def add_bucket(self, name: str, hierarchical: bool = True, location: str = "US-EAST5") -> Path:
        path = self.folder / "buckets" / name
        path.mkdir(parents=True)
        with self.state() as state:
            state["buckets"][name] = {
                "name": name,
                "location": location,
                "hierarchicalNamespace": {"enabled": hierarchical},
            }
        return path

    def calls(self, command: str = "") -> list[list[str]]:
        """The words after gcloud of all calls so far that contain `command`."""
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [words for words in map(json.loads, lines) if command in " ".join(words)]

    # ---------------------------------------------------------------- requests and nodes

    def request(self, name: str, args: dict[str, Any], parent: str) -> None:
        """Queues a request; its nodes exist from the moment it is ACTIVE."""
        kind, _, count = args["accelerator-type"].rpartition("-")
        workers = max(1, int(count) // HOSTS[kind]) if int(count) > 8 or kind == "v4" else 1
        node = {
            "acceleratorType": args["accelerator-type"],
            "runtimeVersion": args["runtime-version"],
            "serviceAccount": {"email": args.get("service-account", "default@my-project")},
        }
        if args.get("node-id"):
            names = [args["node-id"]]
            spec: dict[str, Any] = {"nodeId": args["node-id"], "node": node}
        else:
            prefix = args.get("node-prefix") or name
            names = [f"{prefix}-{number}" for number in range(args["node-count"])]
            params = {"nodeCount": args["node-count"], "nodeIdPrefix": prefix}
            spec = {"multisliceParams": params, "node": node}
        with self.state() as state:
            state["requests"][name] = {
                "name": f"{parent}/queuedResources/{name}",
                "tpu": {"nodeSpec": [spec]},
                "state": {"state": "CREATING"},
                **({"spot": {}} if args.get("spot") else {}),
                "nodes": names,
                "workers": workers,
                "queue": [*state["queue"], "ACTIVE"],
            }

    def advance(self, state: dict[str, Any], name: str) -> dict[str, Any]:
        """The request after one more step through its queue."""
        request = state["requests"][name]
        if request["queue"]:
            step = request["queue"].pop(0)
            if isinstance(step, dict):  # FAILED with a message
                request["state"] = {
                    "state": "FAILED",
                    "failedData": {"error": {"code": 8, "message": step["failed"]}},
                }
                request["queue"] = []
            else:
                request["state"] = {"state": step}
            if step == "ACTIVE":
                for node in request["nodes"]:
                    self._boot(state, node, request)
        return dict(request)

    def _boot(self, state: dict[str, Any], node: str, request: dict[str, Any]) -> None:
        endpoints = []
        for worker in range(request["workers"]):
            home = self.folder / "nodes" / node / f"w{worker}"
            home.mkdir(parents=True)
            digest = zlib.crc32(str(home).encode())
            address = f"127.{64 + digest % 64}.{digest >> 8 & 255}.{worker + 1}"
            endpoints.append({"ipAddress": address, "port": 8470})
        state["nodes"][node] = {
            "name": request["name"].replace("queuedResources", "nodes"),
            "acceleratorType": request["tpu"]["nodeSpec"][0]["node"]["acceleratorType"],
            "state": "READY",
            "health": "HEALTHY",
            "networkEndpoints": endpoints,
        }

    def delete(self, name: str) -> None:
        with self.state() as state:
            request = state["requests"].pop(name)
            for node in request["nodes"]:
                state["nodes"].pop(node, None)
        for node in request["nodes"]:
            self.kill(node)
            shutil.rmtree(self.folder / "nodes" / node, ignore_errors=True)

    # ---------------------------------------------------------------- back doors

    def preempt(self, name: str, request_state: str = "SUSPENDED") -> None:
        """As a spot pod goes: every worker's processes get SIGTERM, then SIGKILL."""
        with self.state() as state:
            request = state["requests"][name]
            grace = state["seconds_of_grace"]
        for node in request["nodes"]:
            self.kill(node, signal.SIGTERM)
        time.sleep(grace)
        with self.state() as state:
            state["requests"][name]["state"] = {"state": request_state}
            for node in request["nodes"]:
                state["nodes"][node]["state"] = "PREEMPTED"
        for node in request["nodes"]:
            self.kill(node)

    def pause(self, command: str) -> None:
        """Every call of `command` from now on waits until another one, or "", is given."""
        with self.state() as state:
            state["pause"] = command

    def cut(self, node: str) -> int:
        """Cuts the ssh connections to a node; what runs there goes on. How many there were."""
        paths = list((self.folder / "connections").glob(f"{node}:*"))
        for path in paths:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.name.split(":")[2]), signal.SIGUSR1)
        return len(paths)

    def processes(self, node: str, worker: int | None = None) -> list[int]:
        """What runs on a node, or on one worker of it."""
        mark = f"{KEY}={self.folder}:{node}:{'' if worker is None else worker}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                for variable in path.read_bytes().split(b"\0"):
                    if variable == mark or (worker is None and variable.startswith(mark)):
                        found.append(int(path.parent.name))
        return found

    def kill(self, node: str, how: int = signal.SIGKILL, worker: int | None = None) -> None:
        for pid in self.processes(node, worker):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, how)
