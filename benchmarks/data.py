"""How fast is data built, loaded and guarded, and does loading keep up with a TPU slice?

    python -m benchmarks data [--json FILE]

Builds TinyCoT's real ingredients from ../shared/data with the 50k GPT-NeoX tokenizer (without that
folder: procedural problems and their small tokenizer) by `memphis data`, then reads an epoch of
batches. Runs on two cores. No accelerator is used: what a slice would eat is computed.
"""

import argparse
import contextlib
import io
import os
import runpy
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import REPO, seconds
from memphis_jax.data import prepare, procedural
from memphis_jax.data.contamination import guard, read_evaluation, row_text
from memphis_jax.data.examples import open_built, read_manifest
from memphis_jax.data.loader import sft_loader
from memphis_jax.rounds.files import write_json, write_jsonl
from memphis_jax.versions import versions

SHARED = REPO.parent / "shared" / "data"
EVALUATION = ("bbh/tasks", "agieval_v1_en", "aqua/dev.json", "aqua/test.json", "mathqa/test.json")

CORES = 2
SEQ_LEN, BATCH_SIZE = 4096, 8
REPEATS = 3  # the median counts

# The slice that loading must feed.
CHIPS = 16  # v5e-16
PEAK = 197e12  # bf16 FLOP/s of a v5e chip: cloud.google.com/tpu/docs/v5e
UTILISATION = 0.4  # assumed share of the peak
PARAMETERS = 2_795_443_200  # StableLM-3B-4E1T: huggingface.co/stabilityai/stablelm-3b-4e1t


def slice_tokens_per_second() -> float:
    """What SFT eats: 6 FLOP per parameter and token (Kaplan et al. 2020, arXiv 2001.08361)."""
    return CHIPS * PEAK * UTILISATION / (6 * PARAMETERS)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks data", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args(argv)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with tempfile.TemporaryDirectory() as work:
        figures = measure(Path(work))
    show(figures)
    if args.json:
        write_json(args.json, figures)


def measure(work: Path) -> dict[str, Any]:
    """Every figure; `work` is an empty folder."""
    inputs = _real_inputs if SHARED.is_dir() else _procedural_inputs
    data, rows, evaluation = inputs(work)
    config = work / "config.json"
    sft = {"epochs": 1, "batch_size": BATCH_SIZE, "seq_len": SEQ_LEN, "optimizer": {}}
    write_json(config, {"data": data, "sft": sft, "rank": sft})
    built = work / "built"

    def build() -> None:
        shutil.rmtree(built, ignore_errors=True)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            prepare.data(["--config", str(config), "--out", str(built)])

    build_seconds = _median_seconds(build)
    manifest = read_manifest(built)
    totals = manifest["totals"]
    load_seconds, filled = _load(built)
    texts = [row_text(row) for row in rows]
    guard_seconds, reasons = _guard(texts, evaluation)
    loaded = sum(filled) / load_seconds
    return {
        "data": "real sets of ../shared/data" if SHARED.is_dir() else "procedural",
        "cores": CORES,
        "load_average": os.getloadavg()[0],  # well above CORES: others took part of the time
        "rows": totals["rows_in"],
        "examples": totals["examples"],
        "tokens": totals["tokens"],
        "build_tokens_per_second": totals["tokens"] / build_seconds,
        "load_tokens_per_second": loaded,
        "load_batches_per_second": len(filled) / load_seconds,
        "packing_efficiency": manifest["packing"][0]["efficiency"],
        "slice_tokens_per_second": slice_tokens_per_second(),
        "load_to_slice": loaded / slice_tokens_per_second(),
        "guard_rows_per_second": len(texts) / guard_seconds,
        "guard_words_per_row": statistics.mean(len(text.split()) for text in texts),
        "guard_evaluation_texts": len(evaluation),
        "guard_found": {why: reasons.count(why) for why in ("exact", "13-gram")},
        "versions": versions(),
    }


def _load(built: Path) -> tuple[float, list[int]]:
    """(seconds for an epoch of batches, the real tokens in each)."""
    examples, manifest = open_built(built)
    slots = (examples.lengths - 1).tolist()  # as training does: no example is read for it
    filled: list[int] = []

    def run() -> None:
        loader = sft_loader(
            examples,
            seq_len=SEQ_LEN,
            batch_size=BATCH_SIZE,
            epochs=1,
            seed=manifest["inputs"]["seed"],
            slots=slots,
        )
        filled[:] = [int((batch["segment_ids"] > 0).sum()) for batch in loader]

    return _median_seconds(run), filled


def _guard(texts: list[str], evaluation: list[str]) -> tuple[float, list[str]]:
    """(seconds for all rows but the first, the reasons): before it, the evaluation is taken in."""
    taken = []
    for _ in range(REPEATS):
        stream = guard(texts, evaluation)
        reasons = [next(stream)]
        start = time.perf_counter()
        reasons += stream
        taken.append(time.perf_counter() - start)
    return statistics.median(taken), reasons


def _median_seconds(run: Callable[[], None]) -> float:
    return statistics.median(seconds(run) for _ in range(REPEATS))


def _real_inputs(work: Path) -> tuple[dict[str, Any], list[dict[str, str]], list[str]]:
    """(the section `data` of a config, the rows, the evaluation questions)."""
    rows = runpy.run_path(str(REPO / "tests" / "tinycot_like.py"))["read_all"](SHARED)
    write_jsonl(work / "rows.jsonl", rows)
    tokenizer = work / "tokenizer"
    tokenizer.mkdir()
    shutil.copy(SHARED / "stablelm" / "20B_tokenizer.json", tokenizer / "tokenizer.json")
    shutil.copy(SHARED / "stablelm" / "special_tokens_map.json", tokenizer)
    data = {
        "source": "mixture",
        "mixture": {"tinycot": {"path": str(work / "rows.jsonl")}},
        "tokenizer": str(tokenizer),
    }
    texts, _ = read_evaluation([str(SHARED / name) for name in EVALUATION])
    return data, rows, texts


def _procedural_inputs(work: Path) -> tuple[dict[str, Any], list[dict[str, str]], list[str]]:
    splits = procedural.generate(20_000, 500, 500, seed=0)
    procedural.write(work / "rows", splits, vocab_size=512)
    data = {"source": "jsonl", "tokenizer": str(work / "rows" / "tokenizer")}
    data |= {split: str(work / "rows" / f"{split}.jsonl") for split in splits}
    return data, splits["train"], [row["prompt"] for row in splits["test"]]


def show(figures: dict[str, Any]) -> None:
    """The table on standard output."""
    table = Table(show_header=False)
    table.title = (
        f"Data: {figures['data']}, {figures['cores']} cores, "
        f"load average {figures['load_average']:.1f}"
    )
    lines = {
        "built": f"{figures['rows']:,} rows, {figures['tokens']:,} tokens",
        "building (memphis data, all of it)": f"{figures['build_tokens_per_second']:,.0f} tokens/s",
        f"loading, batches of {BATCH_SIZE} x {SEQ_LEN}": (
            f"{figures['load_tokens_per_second']:,.0f} tokens/s"
        ),
        "real tokens in packed rows": f"{figures['packing_efficiency']:.2%}",
        f"v5e-{CHIPS} in SFT, 6ND at {UTILISATION:.0%} of peak": (
            f"{figures['slice_tokens_per_second']:,.0f} tokens/s"
        ),
        "loading / slice": f"{figures['load_to_slice']:.1f}",
        f"guard, rows of {figures['guard_words_per_row']:.0f} words (1 core)": (
            f"{figures['guard_rows_per_second']:,.0f} rows/s"
        ),
        f"rows that hold one of {figures['guard_evaluation_texts']:,} evaluation questions": (
            f"{figures['guard_found']}"
        ),
    }
    for name, value in lines.items():
        table.add_row(name, value)
    Console().print(table)


if __name__ == "__main__":
    main()
