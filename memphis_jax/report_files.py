"""What the report reads of a workdir, each file checked and named where it is broken. No jax.

A file that is not there yet is no error: its rows are none. Imports the model card's `read_json`.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from memphis_jax.model_card import read_json

Row = dict[str, Any]

NUMBER = (int, float)
RECORD: Mapping[str, Any] = {  # what the page shows of a stage
    **dict.fromkeys(("stage", "started", "config_sha256", "host"), str),
    **{"command": list, "exit_code": int, "seconds": NUMBER, "versions": dict},
}
ROUND = re.compile(r"round([1-9][0-9]{0,2})")
HELD = "config.json and ledger/, as `memphis rounds` and `memphis scribe` leave them"


def is_run(workdir: Path) -> bool:
    """Whether the folder is of a run: it has a ledger, or a config of ours (not an HF model's)."""
    return (workdir / "ledger").is_dir() or "rounds" in read_json(workdir / "config.json")


def read_lines(path: Path, has: Mapping[str, Any]) -> list[Row]:
    """Rows of a JSON Lines file that hold the first field of `has`; header lines do not.

    has: field -> type. A stage may be writing metrics right now: a last line without its line feed
    is left out. Raises ValueError, naming file and line, for a broken row.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error})") from None
        if isinstance(row, dict) and next(iter(has)) in row:
            rows.append(checked(row, has, where))
    return rows


def checked(row: Row, has: Mapping[str, Any], where: str | Path) -> Row:
    """The row. Raises ValueError where a field is not there or is of another type."""
    for name, kind in has.items():
        if not isinstance(row.get(name), kind):
            raise ValueError(
                f"{where}: the field {name!r} is {row.get(name)!r:.40}, which no stage writes: "
                "run the stage again, or remove the file"
            )
    return row


def read_metrics(path: Path) -> list[Row]:
    """One row per step, in order; of a step logged twice (killed and resumed), the later row."""
    rows = {row["step"]: row for row in read_lines(path, {"step": int})}
    return [rows[step] for step in sorted(rows)]


def read_ledger(workdir: Path) -> list[Row]:
    """The records of the stages in the order in which they started."""
    paths = sorted((workdir / "ledger").glob("*.json"))
    records = [checked(read_json(path), RECORD, path) for path in paths]
    return sorted(records, key=lambda record: record["started"])


def read_accuracies(path: Path, names: tuple[str, ...]) -> Row:
    """What `memphis accuracy` wrote; the numbers that are there are numbers."""
    row = read_json(path)
    return checked(row, {name: NUMBER for name in names if row.get(name) is not None}, path)


def rounds_there(workdir: Path) -> list[int]:
    """The numbers of the folders round1, round2, ... and of nothing that is named alike."""
    found = (ROUND.fullmatch(path.name) for path in workdir.iterdir() if path.is_dir())
    return [int(match[1]) for match in found if match]


def count_parameters(hf_folder: Path) -> int:
    """How many numbers the folder's safetensors files hold, from their headers; 0 without files."""
    count = 0
    for path in hf_folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in list(file.keys()))
    return count
