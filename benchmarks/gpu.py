"""The 3B on one GPU: SFT step at 4096, rank step at 1024, sampling; beside torch + flash attention.

Every measurement is a process of its own: a batch that does not fit must not spoil the next one.
Micro-batches are doubled until one does not fit; the fastest of each engine is then measured again,
in turns. --quick takes one micro-batch of each instead, --minutes ends before a lease does. --log
keeps every process's figures and is read again: a run that was cut off goes on.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu_case import ATTENTION_ROWS, Case
from benchmarks.harness import (
    REPO,
    Served,
    finish,
    machine,
    parser,
    ratio,
    spread,
    table,
    take_turns,
)
from memphis_jax.plan_cost import model_flops

ABOUT = "GPU: the 3B, bfloat16 compute"
INSTALL = "pip install -e '.[cuda12]' on a machine with one, or --tiny to try the script"
ENGINES = {  # with the micro-batch that --quick takes
    "JAX, remat dots": Case("jax", rows=4, remat="dots"),
    "torch + flash, compiled": Case("torch compiled", rows=4, remat="full"),
    "torch + flash": Case("torch", rows=4, remat="full"),
    "torch + flash, compiled, nothing recomputed": Case("torch compiled", rows=1, remat="none"),
    "JAX, remat full": Case("jax", rows=8, remat="full"),
}
SAMPLERS = {"JAX sampler": Case("jax"), "transformers generate": Case("torch")}
MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
SEQUENCES = 128
TEXTS = (1, 10, 40)  # in a row: a size of cuDNN's packed layout each, and the mask as a bias
# Dense bfloat16 FLOP/s by JAX's name of the card. https://www.nvidia.com/en-us/data-center/h100/
# and its A100 and H200 pages, which print twice that, with sparsity.
PEAKS = {
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
}
Figures = dict[str, Any]  # of a process: speed, peak_bytes, device; or error


def main(argv: list[str]) -> None:
    add = (options := parser("gpu", __doc__, repeats=3)).add_argument
    add("--tiny", action="store_true", help="the same on a CPU with a tiny model: a rehearsal")
    add("--quick", action="store_true", help="no search, one turn: about 12 minutes")
    add("--minutes", type=float, default=1e6, help="no process is started after them")
    add("--log", type=Path, default=REPO / "runs" / "gpu.jsonl", help="figures of every process")
    args = options.parse_args(argv)
    repeats = 1 if args.quick else args.repeats
    before, log = machine(), Log(args.log, args.minutes)
    ceiling = log.measure(Case("ceiling", tiny=args.tiny))
    if "error" in ceiling:
        print(f"benchmarks gpu: {ceiling['error']}; {INSTALL}", file=sys.stderr)
        sys.exit(2)
    tables = []
    for phase in ("sft", "rank"):
        cases = {n: c._replace(phase=phase, tiny=args.tiny) for n, c in ENGINES.items()}
        single = args.tiny or args.quick
        found = {name: search(log, case, single) for name, case in cases.items()}
        best = {name: case for name, tried in found.items() if (case := fastest(tried))}
        speeds = log.turns(best, repeats)
        tables.append(step_table(phase, best, speeds, log, ceiling))
        tables.append(search_table(phase, found))
        if phase == "sft":
            rows = 4 if args.tiny else SEQUENCES
            samplers = {
                n: c._replace(phase="sample", rows=rows, tiny=args.tiny)
                for n, c in SAMPLERS.items()
            }
            tables.append(sample_table(samplers, log, repeats))
    tables.append(attention_table(log, args.tiny))
    before["versions"]["gpu"] = ceiling["device"]
    finish(args, "gpu", ABOUT, before, tables, ceiling_flops=ceiling["speed"])


class Log:
    """Figures by (commit, case, turn), kept in a file of JSON lines; what is there is not run."""

    def __init__(self, path: Path, minutes: float):
        self._path, self._commit = path, machine()["commit"]
        self._end = time.monotonic() + 60 * minutes
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self._kept = {line["key"]: line["figures"] for line in map(json.loads, lines)}

    def measure(self, case: Case, turn: int = 0) -> Figures:
        key = self.key(case, turn)
        if key not in self._kept and time.monotonic() > self._end:
            return {"error": "not run: --minutes had passed"}
        if key not in self._kept:
            self._kept[key] = run(case)
            with self._path.open("a") as file:
                file.write(json.dumps({"key": key, "figures": self._kept[key]}) + "\n")
            print(*case, self._kept[key], file=sys.stderr, flush=True)
        return self._kept[key]

    def key(self, case: Case, turn: int) -> str:
        return json.dumps([self._commit, *case, turn])

    def turns(self, cases: dict[str, Case], repeats: int) -> dict[str, list[float]]:
        """{name: the speeds of `repeats` processes}, in turns; none where the first one failed."""
        sound = {n: c for n, c in cases.items() if "error" not in self.measure(c)}
        calls = {
            name: partial(self._next, case, iter(range(repeats))) for name, case in sound.items()
        }
        return take_turns(calls, repeats)

    def _next(self, case: Case, numbers: Iterator[int]) -> float:
        return float(self.measure(case, next(numbers)).get("speed", "nan"))


def run(case: Case) -> Figures:
    """The figures of one process."""
    env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    if case.tiny:
        env["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, "-m", "benchmarks.gpu_worker", json.dumps(case)]
    try:
        with Served(command, env) as worker:
            return worker.ready if "error" in worker.ready else worker.ready | {"speed": worker()}
    except RuntimeError as error:  # it was killed
        return {"error": str(error)[-100:]}


def search(log: Log, case: Case, single: bool) -> dict[Case, Figures]:
    """Micro-batches, doubled until one fails; or the case's own alone."""
    tried: dict[Case, Figures] = {}
    for rows in (case.rows,) if single else MICRO_BATCHES:
        one = case._replace(rows=rows)
        tried[one] = log.measure(one)
        if "error" in tried[one]:
            break
    return tried


def fastest(tried: dict[Case, Figures]) -> Case | None:
    return max(
        (c for c in tried if "speed" in tried[c]), key=lambda c: tried[c]["speed"], default=None
    )


def step_table(
    phase: str, best: dict[str, Case], speeds: dict[str, list[float]], log: Log, ceiling: Figures
) -> dict[str, Any]:
    """A row per engine at its fastest micro-batch."""
    torch = max((v for k, v in speeds.items() if "torch" in k), key=statistics.median, default=None)
    peak, rows = PEAKS.get(ceiling["device"]), []
    for name, values in speeds.items():
        case = best[name]
        flops = model_flops(case.model, case.seq_len, frozen_head=True) * statistics.median(values)
        rows.append(
            (
                name,
                f"{case.micro_batches} x {case.micro_tokens // case.seq_len} x {case.seq_len}",
                spread(values),
                ratio(values, torch) if torch else "-",
                f"{flops / peak:.1%}" if peak else "-",
                f"{flops / ceiling['speed']:.1%}",
                gigabytes(log.measure(case)),
            )
        )
    columns = (
        "engine",
        "micro-batches x rows",
        "tokens/s",
        "x torch",
        "MFU",
        "of matmul ceiling",
        "peak GB",
    )
    known = f"{peak / 1e12:,.1f}" if peak else f"not known for {ceiling['device']}"
    measured = f"{ceiling['speed'] / 1e12:,.1f}"
    note = f"TFLOP/s of bfloat16: datasheet {known}, a square matmul here {measured}."
    return table(f"{phase} step", columns, rows, note)


def gigabytes(figures: Figures) -> str:
    return f"{figures['peak_bytes'] / 1e9:.1f}" if figures["peak_bytes"] else "-"


def search_table(phase: str, found: dict[str, dict[Case, Figures]]) -> dict[str, Any]:
    """Everything that was tried, and why it ended."""
    rows = []
    for name, tried in found.items():
        for case, one in tried.items():
            speed = one.get("error") or f"{one['speed']:,.0f}"
            memory = "" if "error" in one else gigabytes(one)
            rows.append((name, f"{case.micro_tokens:,}", speed, memory))
    columns = ("engine", "tokens of a micro-batch", "tokens/s", "peak GB")
    return table(f"{phase} step: micro-batches", columns, rows)


def sample_table(cases: dict[str, Case], log: Log, repeats: int) -> dict[str, Any]:
    speeds, rows = log.turns(cases, repeats), []
    for name, case in cases.items():
        figures = log.measure(case)
        values = speeds.get(name)
        cells = (spread(values), gigabytes(figures)) if values else (figures["error"], "")
        rows.append((name, str(case.rows), *cells))
    columns = ("sampling, bfloat16", "sequences", "tokens/s", "peak GB")
    return table("Sampling, random weights", columns, rows)


def attention_table(log: Log, tiny: bool) -> dict[str, Any]:
    rows = []
    for texts in TEXTS:
        figures = log.measure(Case("jax", "attention", texts, tiny=tiny))
        cell = figures.get("error") or f"{1e3 / figures['speed']:.2f}"
        rows.append((str(texts), cell, "" if "error" in figures else gigabytes(figures)))
    columns = ("texts in a row", "ms, forward and backward", "peak GB")
    return table(f"Attention of one layer, {ATTENTION_ROWS} rows", columns, rows)
