"""Start-up: from a command to its help, and to its first training step, beside what peers import.

Every turn is a new process. The demo's SFT starts with an empty compile cache and with a full one,
and is ended after its first step. The lines that it and JAX (JAX_LOG_COMPILES) print meanwhile tell
where the time goes.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness

MEMPHIS = (sys.executable, "-m", "memphis_jax")
CONFIG = harness.REPO / "configs" / "tiny.py"
HELP = ("", "train", "sample", "rounds", "data", "grade", "pairs", "accuracy")
IMPORTS = {  # what runs -> the modules that it imports before it computes
    "memphis train": "memphis_jax.commands, memphis_jax.train, memphis_jax.data.loader",
    "memphis sample": "memphis_jax.checkpoint, memphis_jax.sampler",
    "convert to-hf": "convert.to_hf",
    "jax alone": "jax",
    "flax.nnx and optax": "flax.nnx, optax",
    "torch, transformers (a peer's)": "torch, transformers",
}
# What a start is divided into, in its order.
PARTS = ("imports", "data and JAX's start", "tracing, lowering", "XLA or its cache", "the rest")


def main(argv: list[str]) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    args = harness.parser("startup", __doc__, repeats=3).parse_args(argv)
    before = harness.machine()
    tables = [help_table(args.repeats), import_table(args.repeats)]
    with tempfile.TemporaryDirectory() as work:
        tables.append(first_step_table(Path(work), args.repeats))
    harness.finish(args, "startup", "Start-up", before, tables)


def process_seconds(command: Sequence[object]) -> float:
    """Wall time of a process that must succeed; its output is dropped."""
    words = [str(word) for word in command]
    return harness.seconds(
        lambda: subprocess.run(words, check=True, capture_output=True, cwd=harness.REPO)
    )


def help_table(repeats: int) -> dict[str, Any]:
    commands = {
        " ".join(filter(None, ("memphis", name, "--help"))): (
            *MEMPHIS,
            *filter(None, [name]),
            "--help",
        )
        for name in HELP
    }
    commands = {"python -c pass": (sys.executable, "-c", "pass"), **commands}
    found = harness.take_turns(
        {name: partial(process_seconds, command) for name, command in commands.items()}, repeats
    )
    rows = [
        (name, harness.spread(times, ".2f"), loads(commands[name])) for name, times in found.items()
    ]
    return harness.table("Help", ("command", "seconds", "heavy packages it imports"), rows)


def loads(command: Sequence[str]) -> str:
    """Which heavy packages a Python command imports."""
    told = subprocess.run(
        [command[0], "-X", "importtime", *command[1:]],
        capture_output=True,
        text=True,
        cwd=harness.REPO,
    ).stderr
    modules = {line.rpartition("|")[2].strip() for line in told.splitlines()}
    heavy = ("jax", "flax", "orbax.checkpoint", "grain", "torch", "transformers", "datasets")
    return (
        ", ".join(x for x in (*heavy, "pyarrow", "matplotlib", "sympy") if x in modules) or "none"
    )


def imports(modules: str) -> list[str]:
    """A process that imports and is gone: JAX's clearing up at exit would count."""
    return [sys.executable, "-c", f"import os, {modules}; os._exit(0)"]


def import_table(repeats: int) -> dict[str, Any]:
    variants = {
        name: partial(process_seconds, imports(modules)) for name, modules in IMPORTS.items()
    }
    found = harness.take_turns(variants, repeats)
    rows = [
        (
            name,
            IMPORTS[name],
            harness.spread(times, ".2f"),
            harness.ratio(times, found["jax alone"]),
        )
        for name, times in found.items()
    ]
    return harness.table("Imports", ("of", "modules", "seconds", "x jax"), rows)


def first_step_table(work: Path, repeats: int) -> dict[str, Any]:
    data = work / "data"
    process_seconds((*MEMPHIS, "data", "--config", CONFIG, "--out", data))
    command = imports(IMPORTS["memphis train"])
    found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for turn in range(repeats):
        cache = work / f"cache{turn}"
        for kind in found:
            times = {"imports": process_seconds(command)}
            found[kind].append(times | first_step(work / f"{turn}-{kind}", data, cache))
    rows = []
    for kind, turns in found.items():
        total = [one["total"] for one in turns]
        parts = [[divide(one)[part] for one in turns] for part in PARTS]
        cells = [f"{statistics.median(times):.2f}" for times in parts]
        rows.append((f"{kind} compile cache", harness.spread(total, ".2f"), *cells))
    columns = ("seconds, medians", "command to first step", *PARTS)
    note = "Imports are those of a process that does nothing else; the rest holds the step itself."
    return harness.table("The demo's SFT", columns, rows, note)


def divide(one: dict[str, float]) -> dict[str, float]:
    """The seconds of each of PARTS."""
    begun = one["data"] - one["imports"]
    rest = one["total"] - one["data"] - one["lower"] - one["compile"]
    return dict(
        zip(PARTS, (one["imports"], begun, one["lower"], one["compile"], rest), strict=True)
    )


def first_step(workdir: Path, data: Path, cache: Path) -> dict[str, float]:
    """Starts the SFT stage and ends it after one step.

    Seconds: total, data (until its examples are open), lower (tracing and lowering), compile.
    """
    command = [*MEMPHIS, "train", "--config", CONFIG, "--phase", "sft", "--workdir", workdir]
    command += ["--data", data, "--tokenizer", data / "tokenizer", "--config.sft.log_every=1"]
    environment = {"JAX_LOG_COMPILES": "1", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    begun = time.perf_counter()
    with subprocess.Popen(
        [str(word) for word in command],
        stderr=subprocess.PIPE,
        text=True,
        cwd=harness.REPO,
        env=os.environ | environment,
    ) as process:
        assert process.stderr is not None
        opened, lines = 0.0, []
        for line in process.stderr:
            lines.append(line)
            if line.startswith(f"{data}: "):
                opened = time.perf_counter() - begun
            if line.startswith("sft 1/"):
                total = time.perf_counter() - begun
                process.kill()
                return {"total": total, "data": opened, **compile_seconds("".join(lines))}
    raise RuntimeError("".join(lines))


def compile_seconds(log: str) -> dict[str, float]:
    """{lower, compile} as JAX_LOG_COMPILES told; an inner function's tracing is in its outer's."""
    compiled = re.findall(r"Finished XLA compilation of jit\((.+)\) in ([\d.e-]+) sec", log)
    lowered = re.findall(r"module conversion jit\((.+)\) in ([\d.e-]+) sec", log)
    names = {name for name, _ in compiled}
    traced = re.findall(r"Finished tracing (.+) for jit in ([\d.e-]+) sec", log)
    lowered += [(name, took) for name, took in traced if name in names]
    return {
        "lower": sum(float(took) for _, took in lowered),
        "compile": sum(float(took) for _, took in compiled),
    }
