"""Sampling speed of the two engines on the same prompts, taking turns in one run.

Each engine is a process of its own that loads a random model, samples once unmeasured, and then
samples whenever the parent says so; the parent lets them take turns. Tokens/s of new tokens, from
the first request to the last answer; loading is told apart.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

REPO = Path(__file__).parents[1]
MODELS = {  # name: (shape, questions)
    "demo, 0.2 M": ({}, 96),
    "20 M": (
        {
            **{"hidden_size": 448, "intermediate_size": 1232, "num_hidden_layers": 8},
            **{"num_attention_heads": 7, "num_key_value_heads": 7},
        },
        16,
    ),
}
SAMPLES, NEW_TOKENS, CONTEXT = 8, 48, 256
VLLM: dict[str, tuple[dict[str, Any], dict[str, str]]] = {  # name: (arguments of LLM, environment)
    "vLLM": ({}, {}),
    "vLLM, not compiled": ({"enforce_eager": True}, {}),
    "vLLM, all cores": ({}, {"VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}"}),
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks generate", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="measured passes of each")
    parser.add_argument("--python", default=".venv-vllm/bin/python", help="has vLLM")
    parser.add_argument("--only-jax", action="store_true", help="no vLLM: on an accelerator")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        serve(*args.serve)
        return
    result: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for model, (shape, questions) in MODELS.items():
            made = make_model(Path(folder) / model.replace(" ", ""), shape, questions)
            for dtype in ("float32", "bfloat16"):
                rows = compare(made, dtype, args)
                result["rows"] += [{"model": model, "dtype": dtype, **row} for row in rows]
    _show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def make_model(folder: Path, shape: dict[str, int], questions: int) -> Path:
    """FOLDER/{checkpoint,hf,prompts.json}: random weights, and prompts of the demo's questions."""
    import jax

    from convert.to_hf import to_hf
    from memphis_jax import checkpoint
    from memphis_jax.config import ModelConfig, load
    from memphis_jax.data import procedural
    from memphis_jax.data.prompts import encode_prompt, load_tokenizer
    from memphis_jax.model import StableLM

    demo = load(str(REPO / "configs" / "tiny.py"))
    fields = {**vars(demo.model), **shape}
    splits = procedural.generate(2000, 10, questions, 0)
    procedural.write(folder / "data", splits, demo.data.vocab_size)
    model = StableLM(ModelConfig(**fields), jax.random.PRNGKey(0))
    with checkpoint.open_manager(folder / "checkpoint", keep=1) as manager:
        checkpoint.save(manager, 0, model, {})
        manager.wait_until_finished()
    checkpoint.copy_tokenizer(folder / "data" / "tokenizer", folder / "checkpoint")
    to_hf(folder / "checkpoint", folder / "hf")
    tokenizer, _ = load_tokenizer(folder / "data" / "tokenizer")
    rows = [encode_prompt(tokenizer, row["prompt"]) for row in splits["test"]]
    (folder / "prompts.json").write_text(json.dumps(rows))
    return folder


def compare(folder: Path, dtype: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Lets all engines take turns; one row each."""
    variants = list(VLLM) if dtype == "float32" else ["vLLM"]  # one dtype tells the settings apart
    names = ["JAX", *([] if args.only_jax else variants)]
    engines, loading = {}, {}
    try:
        for name in names:
            python = sys.executable if name == "JAX" else args.python
            words = [python, "-m", "benchmarks.generate", "--serve", name, str(folder), dtype]
            begun = time.perf_counter()
            engines[name] = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=REPO,
                env={**os.environ, "PYTHONPATH": str(REPO), **VLLM.get(name, ({}, {}))[1]},
            )
            _answer(engines[name])  # ready: loaded and warm
            loading[name] = time.perf_counter() - begun
        passes: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(args.repeats):
            for name, engine in engines.items():
                assert engine.stdin is not None
                engine.stdin.write("go\n")
                engine.stdin.flush()
                passes[name].append(_answer(engine))
    finally:
        for engine in engines.values():
            engine.kill()
            engine.wait()
    return [
        {"engine": name, "tokens_per_second": passes[name], "ready_after_seconds": loading[name]}
        for name in names
    ]


def _answer(engine: "subprocess.Popen[str]") -> float:
    assert engine.stdout is not None
    for line in engine.stdout:
        if line.startswith("BENCH "):
            return float(line.split()[1])
    raise RuntimeError(f"{engine.args!r} ended early: run it by hand to see why")


def serve(name: str, folder: str, dtype: str) -> None:
    """Of one engine: loads, warms up, then measures a pass for every line on standard input."""
    prompts = json.loads((Path(folder) / "prompts.json").read_text())
    prepare = _jax_pass if name == "JAX" else _vllm_pass
    one_pass = prepare(Path(folder), dtype, prompts, VLLM.get(name, ({}, {}))[0])
    next(one_pass)
    print("BENCH 0", flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        tokens = next(one_pass)
        print(f"BENCH {tokens / (time.perf_counter() - begun):.1f}", flush=True)


def _jax_pass(folder: Path, dtype: str, prompts: list[Any], _: Any) -> Iterator[int]:
    from memphis_jax import checkpoint, sampler
    from memphis_jax.runtime import start_jax

    start_jax()
    model, _ = checkpoint.restore_model(folder / "checkpoint")
    rows = [prompt for prompt in prompts for _ in range(SAMPLES)]
    number = 0
    while True:
        done = sampler.sample(
            model,
            rows,
            sampler.row_keys(number, [(i, 0) for i in range(len(rows))]),
            temperature=1.0,
            top_p=0.8,
            max_new_tokens=NEW_TOKENS,
            eos_id=0,
            batch_size=128,  # divides the rows of both models: none is padding
            dtype=dtype,
        )
        number += 1
        yield sum(len(one.tokens) for one in done)


def _vllm_pass(
    folder: Path, dtype: str, prompts: list[Any], options: dict[str, Any]
) -> Iterator[int]:
    from memphis_jax.rounds import engine
    from memphis_jax.rounds.requests import NEUTRAL, Request

    llm = engine.load(
        folder / "hf",
        dtype=dtype,
        context=CONTEXT,
        model_impl="vllm",
        tensor_parallel_size=1,
        **options,
    )
    sampling = {"temperature": 1.0, "top_p": 0.8, "max_tokens": NEW_TOKENS, **NEUTRAL}
    sampling |= {"stop": ["\n### User:"], "stop_token_ids": [0]}
    number = 0
    while True:
        requests = [
            Request(str(i), k, prompt, seed=number + i * SAMPLES + k, logprobs=False)
            for i, prompt in enumerate(prompts)
            for k in range(SAMPLES)
        ]
        number += len(requests)
        total = 0
        ignore: Callable[[int, int], None] = lambda rows, tokens: None  # noqa: E731
        for _, rows in engine.sample(llm, {0: requests}, sampling, ignore):
            total += sum(len(output.tokens) for _, output in rows)
        yield total


def _show(result: dict[str, Any]) -> None:
    title = f"{result['cpu']}, {result['cores']} cores, load {result['load_average']:.1f} at start"
    table = Table(title=title)
    for name in ("model", "dtype", "engine"):
        table.add_column(name)
    for name in ("tokens/s", "least", "most", "x JAX", "ready after s"):
        table.add_column(name, justify="right")
    base = 1.0
    for row in result["rows"]:
        speeds = row["tokens_per_second"]
        middle = statistics.median(speeds)
        base = middle if row["engine"] == "JAX" else base
        cells = (middle, min(speeds), max(speeds))
        table.add_row(
            *(row["model"], row["dtype"], row["engine"]),
            *(f"{value:,.0f}" for value in cells),
            *(f"{middle / base:.2f}", f"{row['ready_after_seconds']:.0f}"),
        )
    Console(width=110).print(table)


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main(sys.argv[1:])
