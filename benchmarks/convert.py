"""Converting 2 GB of the 3B's tensors, both ways, beside a plain copy of the same files.

    python -m benchmarks convert [--gigabytes 2]

Everything runs in a process of its own and in turns, with its input in the page cache, and counts
once its output is on the disk; the time is that of the call, without Python's start and imports.
Memory is the most that the process held (VmHWM), less what it held once it had imported all.
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.merge import make_model
from memphis_jax.tensors import open_tensors

TASKS = {  # what runs: (source, target) inside the working folder
    "copy of the HF folder": ("copy", "hf", "copied"),
    "from-hf": ("from_hf", "hf", "made"),
    "copy of the checkpoint": ("copy", "checkpoint", "copied"),
    "to-hf": ("to_hf", "checkpoint", "made"),
    "verify": ("verify", "exported", "checkpoint"),
    "restore of what from-hf wrote": ("restore", "checkpoint", ""),
    "save by the trainer": ("save", "checkpoint", "made"),
    "restore of what it saved": ("restore", "run", ""),
    "to-hf of what it saved": ("to_hf", "run", "made"),
}
BESIDE = {"from-hf": "copy of the HF folder", "to-hf": "copy of the checkpoint"}


def main(argv: Sequence[str]) -> None:
    if argv[:1] == ["--task"]:
        return task(*argv[1:])
    parser = harness.parser("convert", __doc__, repeats=3)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the model")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary one)")
    args = parser.parse_args(argv)
    before = harness.machine()
    with tempfile.TemporaryDirectory(prefix="memphis-convert-", dir=args.folder) as name:
        tables = [measure(Path(name), args)]
    harness.finish(args, "convert", "Conversion beside a plain copy", before, tables)


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    # In a process of its own: what this one holds would count for its children too.
    work = (folder / "hf", args.gigabytes, 0)
    maker = multiprocessing.get_context("spawn").Process(target=make_model, args=work)
    maker.start()
    maker.join()
    for kind, *paths in (("from_hf", "hf", "checkpoint"), ("to_hf", "checkpoint", "exported")):
        run(folder, kind, *paths)
    run(folder, "save", "checkpoint", "run")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in TASKS}

    def variant(name: str) -> Callable[[], float]:
        def once() -> float:
            found[name].append(run(folder, *TASKS[name]))
            for made in ("made", "copied"):
                shutil.rmtree(folder / made, ignore_errors=True)
            os.sync()
            return found[name][-1]["seconds"]

        return once

    seconds = harness.take_turns({name: variant(name) for name in TASKS}, args.repeats)
    sizes = [tensor.num_bytes for tensor in open_tensors(folder / "hf").values()]
    return as_table(seconds, found, sizes)


def as_table(
    seconds: dict[str, list[float]], found: dict[str, list[dict[str, float]]], sizes: list[int]
) -> dict[str, Any]:
    rows = []
    for name, times in seconds.items():
        above = [run["peak_mb"] - run["imported_mb"] for run in found[name]]
        peer = seconds.get(BESIDE.get(name, ""))
        rows.append(
            [
                name,
                harness.spread(times, ".1f"),
                harness.spread([sum(sizes) / 1e9 / second for second in times], ".2f"),
                harness.ratio(times, peer) if peer else "",
                harness.spread(above),
                f"{1e6 * max(above) / max(sizes):.2f}",
                harness.spread([run["imported_mb"] for run in found[name]]),
            ]
        )
    title = f"A model of {sum(sizes) / 1e9:.2f} GB in bfloat16, largest tensor "
    title += f"{max(sizes) / 1e6:.0f} MB (an embedding)"
    head = ["", "seconds", "GB/s", "time of the copy", "MB above imports", "in largest tensors"]
    note = (
        "to-hf hashes every tensor, every file and the checkpoint. The trainer's checkpoint is of "
        "bfloat16 here, so that all rows are of the same bytes."
    )
    return harness.table(title, [*head, "MB with imports"], rows, note)


def run(folder: Path, kind: str, source: str, target: str) -> dict[str, float]:
    """{seconds, imported_mb, peak_mb} of one task in a new process, its input read once before."""
    for path in sorted((folder / source).rglob("*")):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.read(2**23):
                    pass
    words = [sys.executable, "-m", "benchmarks", "convert", "--task", kind]
    paths = [str(folder / source), str(folder / target)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*words, *paths], cwd=harness.REPO, env=environment, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(f"{kind} of {source}: exit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def task(kind: str, source: str, target: str) -> None:
    work = prepared(kind, Path(source), Path(target))
    imported = peak_mb()
    seconds = harness.seconds(work)
    print(json.dumps({"seconds": seconds, "imported_mb": imported, "peak_mb": peak_mb()}))


def prepared(kind: str, source: Path, target: Path) -> Callable[[], Any]:
    """The task, once everything that it needs is imported."""
    if kind == "copy":
        return lambda: copy(source, target)
    from convert.from_hf import from_hf
    from convert.to_hf import to_hf
    from convert.verify import verify
    from memphis_jax.checkpoint import open_manager, restore_model, save

    def saving() -> None:
        with open_manager(target, keep=1) as manager:  # waits for the writes when it closes
            save(manager, 0, model, {})

    if kind == "save":
        model, _ = restore_model(source, "bfloat16")
    return {
        "from_hf": lambda: from_hf(source, target),
        "to_hf": lambda: to_hf(source, target),
        "verify": lambda: verify(source, target),
        "restore": lambda: restore_model(source, "bfloat16"),
        "save": saving,
    }[kind]


def copy(source: Path, target: Path) -> None:
    """Every file, on the disk when this returns, as after a conversion."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            made = target / path.relative_to(source)
            made.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, made)
            with open(made, "rb+") as file:
                os.fsync(file.fileno())


def peak_mb() -> float:
    """The most that this process ever held."""
    kb = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert kb, "reads Linux's /proc"
    return int(kb[1]) * 1024 / 1e6
