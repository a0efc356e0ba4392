"""`memphis eval` with each engine on the same weights and questions: agreement and wall time.

Two models of 3.3 M parameters (heads of 32, vocabulary 50304, context 4096), one random and one
trained for a minute on questions of the same kind; float32; GSM8K (training questions as test),
three BBH tasks and SAT-Math from `--data-root`. Each engine is one `memphis eval` per model, one
after the other. Agreement is with hf: greedy texts, scores, and logprobs per token.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import REPO

ENGINES = ("hf", "jax", "vllm")
BBH = tuple(f"bbh_cot_fewshot_{n}" for n in ("boolean_expressions", "navigate", "object_counting"))
SHAPE: dict[str, Any] = {
    **{"vocab_size": 50304, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "partial_rotary_factor": 0.25},
    "max_position_embeddings": 4096,
}
ROWS, LENGTH = 8, 256  # of a training step
Row = dict[str, Any]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks eval", description=__doc__)
    add = parser.add_argument
    add("--data-root", type=Path, default=REPO.parent / "shared" / "data")
    add("--engines", default=",".join(ENGINES), help="hf is what the others are compared with")
    add("--models", default="random,trained")
    add("--limit", type=int, default=200, help="questions of gsm8k and of sat-math")
    add(
        "--bbh-limit", type=int, default=24, help="questions of each BBH task: 1024 new tokens each"
    )
    add("--steps", type=int, default=150, help="of the training")
    add("--batch-size", type=int, default=50, help="of jax and hf")
    add("--python", default=".venv-vllm/bin/python", help="has vLLM")
    add("--json", type=Path, help="write the figures here too")
    args = parser.parse_args(argv)
    rows = []
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models.split(","):
            hf = make_model(Path(folder) / name, args.data_root, args.steps * (name == "trained"))
            outs = {e: Path(folder) / f"{name}-{e}" for e in args.engines.split(",")}
            seconds = {engine: run(engine, hf, out, args) for engine, out in outs.items()}
            for engine, out in outs.items():
                wanted = outs.get("hf", out)
                row = {"model": name, "engine": engine, "wall_seconds": seconds[engine]}
                rows.append(row | compare(wanted, out, hf))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    result = {"cores": os.cpu_count(), "load_average": load, "rows": rows}
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def make_model(folder: Path, root: Path, steps: int) -> Path:
    """An HF folder: random weights, trained for `steps` on texts in the form of the prompts."""
    import jax

    from convert.to_hf import to_hf
    from memphis_jax import checkpoint
    from memphis_jax.config import ModelConfig
    from memphis_jax.model import StableLM
    from memphis_jax.runtime import start_jax

    start_jax()
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    source = root / "stablelm"
    shutil.copy(source / "20B_tokenizer.json", tokenizer / "tokenizer.json")
    shutil.copy(source / "tokenizer_config.guess.json", tokenizer / "tokenizer_config.json")
    shutil.copy(source / "special_tokens_map.json", tokenizer)
    # Embeddings of the size that makes every layer count.
    model = StableLM(ModelConfig(**SHAPE, initializer_range=0.1), jax.random.PRNGKey(0))
    model = train(model, tokenizer, root, steps) if steps else model
    with checkpoint.open_manager(folder / "checkpoint", keep=1) as manager:
        checkpoint.save(manager, 0, model, {})
        manager.wait_until_finished()
    checkpoint.copy_tokenizer(tokenizer, folder / "checkpoint")
    to_hf(folder / "checkpoint", folder / "hf")
    return folder / "hf"


def train(model: Any, tokenizer: Path, root: Path, steps: int) -> Any:
    """AdamW on GSM8K's later training questions and BBH's worked examples, as one long text."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from tokenizers import Tokenizer

    lines = (root / "gsm8k" / "train.jsonl").read_text().splitlines()[2000:]
    asked = [json.loads(line) for line in lines]
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in asked]
    texts += [path.read_text() for path in sorted((root / "bbh" / "cot-prompts").glob("*.txt"))] * 9
    order = np.random.default_rng(0).permutation(len(texts))
    tokens = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    ids = np.array(tokens.encode("\n\n".join(texts[i] for i in order)).ids, np.int32)
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 10, steps))

    def loss(model: Any, batch: Any) -> Any:
        logits = model.logits(batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    @jax.jit
    def step(model: Any, state: Any, batch: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(model, batch)
        updates, state = optimizer.update(gradients, state, model)
        return optax.apply_updates(model, updates), state, value

    state, rng = optimizer.init(model), np.random.default_rng(1)
    for number in range(steps):
        starts = rng.integers(0, len(ids) - LENGTH - 1, ROWS)
        batch = jnp.asarray(np.stack([ids[s : s + LENGTH + 1] for s in starts]))
        model, state, value = step(model, state, batch)
        if number % 50 == 0 or number == steps - 1:
            print(f"training step {number}: loss {float(value):.2f}", file=sys.stderr, flush=True)
    return model


def run(engine: str, hf: Path, out: Path, args: argparse.Namespace) -> float:
    """Wall seconds of `memphis eval`, loading and compilation included."""
    words = [sys.executable, "-m", "memphis_jax", "eval", str(hf), "--engine", engine]
    words += ["--data-root", str(args.data_root), "--dtype", "float32", "--python", args.python]
    words += ["--batch-size", str(args.batch_size)]
    begun = time.perf_counter()
    for part, tasks, limit in (
        ("short", ("gsm8k", "agieval_sat_math"), args.limit),
        ("long", BBH, args.bbh_limit),
    ):
        own = ["--tasks", ",".join(tasks), "--limit", str(limit), "--out", str(out / part)]
        (out / part).mkdir(parents=True)
        subprocess.run([*words, *own], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def compare(wanted: Path, found: Path, hf: Path) -> Row:
    """Agreement of two evaluations of one model, and the seconds of answering alone."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(hf / "tokenizer.json"))
    texts = same = logprobs = 0
    worst, scores = 0.0, {}
    for path in sorted(found.glob("*/samples/*.jsonl")):
        theirs = wanted / path.relative_to(found)
        for ours, reference in zip(_samples(path), _samples(theirs), strict=True):
            assert ours["arguments"] == reference["arguments"]
            for args, a, b in zip(
                ours["arguments"], ours["resps"], reference["resps"], strict=True
            ):
                if isinstance(a[0], str):
                    texts, same = texts + 1, same + (a == b)
                    continue
                logprobs += 1
                length = len(tokenizer.encode(args[1]).ids)
                worst = max(worst, abs(a[0][0] - b[0][0]) / length)
    different = []
    for part in ("short", "long"):
        ours, reference = (
            json.loads((folder / part / "results.json").read_text()) for folder in (found, wanted)
        )
        for task, values in ours["tasks"].items():
            scores |= {
                f"{task} {k}": round(100 * v["value"], 2) for k, v in values["metrics"].items()
            }
            if values["metrics"] != reference["tasks"][task]["metrics"]:
                different.append(task)
    return {
        "texts": texts,
        "identical": same,
        "loglikelihoods": logprobs,
        "worst_per_token": worst,
        "different_scores": different,
        "scores": scores,
    }


def _samples(path: Path) -> list[Row]:
    """One row per question; gsm8k's two filters share their answers."""
    with path.open(encoding="utf-8") as file:  # str.splitlines also cuts at U+2028 and the like
        return [json.loads(line) for line in file]


def show(result: Row) -> None:
    table = Table(title=f"{result['cores']} cores, load {result['load_average']:.1f} at start")
    for name in ("model", "engine"):
        table.add_column(name)
    for name in ("wall s", "x hf", "texts as hf", "worst |dlogprob|/token", "tasks scored apart"):
        table.add_column(name, justify="right")
    base = 1.0
    for row in result["rows"]:
        base = row["wall_seconds"] if row["engine"] == "hf" else base
        table.add_row(
            *(row["model"], row["engine"], f"{row['wall_seconds']:.0f}"),
            *(f"{base / row['wall_seconds']:.1f}", f"{row['identical']} of {row['texts']}"),
            *(f"{row['worst_per_token']:.1e}", str(len(row["different_scores"]))),
        )
    console = Console(width=110)
    console.print(table)
    for row in result["rows"]:
        if row["engine"] == "hf":
            console.print(f"{row['model']}: {row['scores']}", markup=False)
