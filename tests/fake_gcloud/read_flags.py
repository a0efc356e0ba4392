"""Prints flags.json: what the real gcloud on PATH says of the flags of the commands launch/ uses.

    python tests/fake_gcloud/read_flags.py > tests/fake_gcloud/flags.json

`gcloud meta lint-gcloud-commands` needs no account and no network.
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

COMMANDS = (
    "auth list",
    "config get-value",
    "compute tpus accelerator-types list",
    "compute tpus queued-resources create",
    "compute tpus queued-resources delete",
    "compute tpus queued-resources describe",
    "compute tpus tpu-vm describe",
    "compute tpus tpu-vm scp",
    "compute tpus tpu-vm ssh",
    "storage buckets describe",
)


def lint(commands: list[str]) -> list[dict[str, Any]]:
    """The real parser's verdict on each command line: success, error_message, args_structure."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "commands.json"
        path.write_text(json.dumps([{"command_string": command} for command in commands]))
        call = ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={path}"]
        environment = os.environ | {"CLOUDSDK_CONFIG": folder}  # nobody's account
        done = subprocess.run(call, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def simplified(argument: dict[str, Any]) -> dict[str, Any] | None:
    if group := argument.get("group"):
        inner = [simple for a in group["arguments"] if (simple := simplified(a))]
        flags = {name: True for name in ("required", "mutex") if group.get(name)}
        return {"group": inner, **flags} if inner else None
    if argument.get("global"):
        return None
    kept = {
        k: argument[k] for k in ("name", "positional", "required", "choices") if argument.get(k)
    }
    kind = argument.get("type", "string")
    return kept | ({"type": kind} if kind in ("bool", "int") else {})


def table() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, row in zip(COMMANDS, lint([f"gcloud {name}" for name in COMMANDS]), strict=True):
        arguments = row["args_structure"]["arguments"]
        found[name] = [simple for a in arguments if (simple := simplified(a))]
        found["global"] = {a["name"]: a.get("type") for a in arguments if a.get("global")}
    return found


if __name__ == "__main__":
    print(json.dumps(table(), indent=1, sort_keys=True))
