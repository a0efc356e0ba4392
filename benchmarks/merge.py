"""Merging two random models, beside mergekit on the same files: seconds, peak memory, agreement.

    python -m benchmarks merge --mergekit MERGEKIT_VENV/bin/python [--gigabytes 2]

The models are of StableLM's shape, bfloat16, in two shards each; the second is the first with noise
of 5 degrees or, for every fourth tensor, of half a degree, where SLERP is linear. Memory is the
most that a process held (ru_maxrss), less what it holds once it has imported its packages.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks import harness
from memphis_jax.rounds.certificate import file_hashes
from memphis_jax.rounds.files import write_json
from memphis_jax.tensors import header, open_tensors, to_float64

WIDTH, MLP, VOCABULARY = 2560, 6912, 50304  # of the 3B


def main(argv: Sequence[str]) -> None:
    parser = harness.parser("merge", __doc__, repeats=3)
    parser.add_argument("--mergekit", help="interpreter of an environment that has mergekit")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of each model")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary one)")
    args = parser.parse_args(argv)
    before = harness.machine()
    with tempfile.TemporaryDirectory(prefix="memphis-merge-", dir=args.folder) as name:
        folder = Path(name)
        for seed, model in enumerate(("a", "b")):
            # In a process of its own: what this one holds would count for its children too.
            work = (folder / model, args.gigabytes, seed)
            maker = multiprocessing.get_context("spawn").Process(target=make_model, args=work)
            maker.start()
            maker.join()
        tables = [measure(folder, args.mergekit, args.repeats)]
        if args.mergekit:
            tables.append(compare(folder / "ours", folder / "theirs"))
    harness.finish(args, "merge", "Merging two models beside mergekit", before, tables)


def shapes(gigabytes: float) -> dict[str, tuple[int, ...]]:
    """The 3B's tensors, of as many layers as are needed."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "lm_head.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
        "model.norm.bias": (WIDTH,),
    }
    layer = 0
    while layer == 0 or 2 * sum(int(np.prod(s)) for s in found.values()) < gigabytes * 1e9:
        at = f"model.layers.{layer}."
        found |= {f"{at}self_attn.{x}_proj.weight": (WIDTH, WIDTH) for x in "qkvo"}
        found |= {f"{at}mlp.{x}_proj.weight": (MLP, WIDTH) for x in ("gate", "up")}
        found[f"{at}mlp.down_proj.weight"] = (WIDTH, MLP)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found |= {f"{at}{norm}.{x}": (WIDTH,) for x in ("weight", "bias")}
        layer += 1
    return found


def make_model(folder: Path, gigabytes: float, seed: int) -> None:
    """A certified folder; of seed 1, the model of seed 0 with noise."""
    folder.mkdir()
    table = shapes(gigabytes)
    names, half = list(table), len(table) // 2
    weight_map = {}
    for number, members in enumerate((names[:half], names[half:]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        with open(folder / file, "wb") as out:
            out.write(header({name: ("BF16", table[name]) for name in members}))
            for name in members:
                out.write(values(name, table[name], seed).view(np.uint8).data)
        weight_map |= dict.fromkeys(members, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    layers = sum(name.endswith("q_proj.weight") for name in names)
    config = {
        "architectures": ["StableLmForCausalLM"],
        "model_type": "stablelm",
        "num_hidden_layers": layers,
        "torch_dtype": "bfloat16",
    }
    write_json(folder / "config.json", config)
    write_json(folder / "conversion.json", {"files": file_hashes(folder)})


def values(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """bfloat16 of a name's own seed."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    value = 0.02 * np.random.default_rng(digest).standard_normal(shape, np.float32)
    if seed:
        noise = np.random.default_rng(digest + 1).standard_normal(shape, np.float32)
        degrees = 0.5 if digest % 4 == 0 else 5.0
        value += 0.02 * np.float32(np.tan(np.radians(degrees))) * noise
    return value.astype(ml_dtypes.bfloat16)


def measure(folder: Path, mergekit: str | None, repeats: int) -> dict[str, Any]:
    a = folder / "a"
    sizes = [tensor.num_bytes for tensor in open_tensors(a).values()]
    commands = merges(folder, mergekit)
    runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
    starts = {name: timed(imports)[2] for name, (_, imports) in commands.items()}

    def variant(name: str) -> Callable[[], float]:
        def once() -> float:
            runs[name].append(timed(commands[name][0]))
            return runs[name][-1][0]

        return once

    copies = {"copy of one model": lambda: copying(a, folder / "copy")}
    variants = {name: variant(name) for name in commands} | copies
    seconds = harness.take_turns(variants, repeats)
    rows = []
    for name, times in seconds.items():
        row = [name, harness.spread(times, ".1f")]
        if name in runs:
            above = [peak - starts[name] for _, _, peak in runs[name]]
            row += [harness.spread([cpu for _, cpu, _ in runs[name]], ".1f"), harness.spread(above)]
            row += [f"{1e6 * max(above) / max(sizes):.2f}", f"{starts[name]:.0f}"]
        rows.append([*row, *[""] * (6 - len(row))])
    title = f"SLERP of two models of {sum(sizes) / 1e9:.2f} GB, largest tensor "
    title += f"{max(sizes) / 1e6:.0f} MB"
    head = ["", "seconds", "of processors", "MB above imports", "in largest tensors"]
    note = "Ours also hashes both models, checks their certificates and writes one."
    return harness.table(title, [*head, "MB with imports"], rows, note)


def merges(folder: Path, mergekit: str | None) -> dict[str, tuple[list, list]]:
    """{name: (command, one that only imports what it needs)}"""
    a, b = folder / "a", folder / "b"
    python = [sys.executable, "-m"]
    commands: dict[str, tuple[list, list]] = {
        "memphis merge": (
            [*python, "memphis_jax", "merge", a, b, "--out", folder / "ours", "--t", "0.4"],
            [sys.executable, "-c", "import memphis_jax.merge"],
        )
    }
    if mergekit:
        recipe = {
            "models": [{"model": str(a)}, {"model": str(b)}],
            "merge_method": "slerp",
            "base_model": str(a),
            "parameters": {"t": 0.4},
            "dtype": "bfloat16",
        }
        (folder / "recipe.yml").write_text(json.dumps(recipe))  # JSON is YAML
        module = "mergekit.scripts.run_yaml"
        options = ["--no-copy-tokenizer", "--quiet"]
        commands["mergekit"] = (
            [mergekit, "-m", module, folder / "recipe.yml", folder / "theirs", *options],
            [mergekit, "-c", f"import {module}"],
        )
    return commands


def timed(command: Sequence[object]) -> tuple[float, float, float]:
    """(seconds, of processor time, MB at most) of a process that must succeed."""
    start = time.perf_counter()
    words = [str(word) for word in command]
    process = subprocess.Popen(words, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"{' '.join(words)}: exit status {status}")
    return seconds, usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss / 1e6


def compare(ours: Path, theirs: Path) -> dict[str, Any]:
    """A table: share of numbers equal to the bit, the largest difference, the root mean square."""
    left, right = open_tensors(ours), open_tensors(theirs)
    assert left.keys() == right.keys()
    equal = count = 0
    most = squares = 0.0
    for name, tensor in left.items():
        for rows in tensor.pieces(1 << 20):
            x, y = tensor.read(rows), right[name].read(rows)
            equal += int((x.view(np.uint16) == y.view(np.uint16)).sum())
            x, y = to_float64(x), to_float64(y)
            count, squares = count + x.size, squares + float((x * x).sum())
            most = max(most, float(np.abs(x - y).max()))
    rms = (squares / count) ** 0.5
    row = [f"{count:,}", f"{100 * equal / count:.4f} %", f"{most:.1e}", f"{rms:.1e}"]
    head = ["numbers", "equal to the bit", "largest difference", "their root mean square"]
    return harness.table("Both results, number by number", head, [row])


def copying(source: Path, target: Path) -> float:
    """Seconds that reading one model and writing it takes by itself."""
    shutil.rmtree(target, ignore_errors=True)
    start = time.perf_counter()
    shutil.copytree(source, target)
    os.sync()
    return time.perf_counter() - start
