"""Sampling speed beside vLLM and transformers on the same prompts, in turns.

Engines are processes of their own, with the same random model, float32: prompts of the demo's
questions, eight samples of each, top-p 0.8. Every answer's length is given to all, so that all
draw the same number of tokens: 48, or geometric of mean 48, at most 160. transformers and "ours,
waiting" take a batch and wait for its longest. Tokens/s of new tokens that count, prompts included.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.harness import REPO

ABOUT = "Sampling on a CPU"
SHAPES: dict[str, dict[str, int]] = {
    "demo, 0.2 M": {},
    "20 M": {
        **{"hidden_size": 448, "intermediate_size": 1232, "num_hidden_layers": 8},
        **{"num_attention_heads": 7, "num_key_value_heads": 7},
    },
}
LENGTHS = ("equal", "varying")
SAMPLES, CONTEXT, NO_EOS, LONGEST = 8, 256, 100_000, 160
ENGINES: dict[str, dict[str, str]] = {  # name: environment
    "memphis_jax": {"JAX_PLATFORMS": "cpu"},
    "memphis_jax, waiting": {"JAX_PLATFORMS": "cpu"},
    "vLLM": {},
    "vLLM, all cores": {"VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}"},
    "transformers": {},
}


def main(argv: list[str]) -> None:
    parser = harness.parser("sampler", __doc__, repeats=3)
    parser.add_argument("--python", default=".venv-vllm/bin/python", help="has vLLM")
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--questions", type=int, default=64, help="eight answers each")
    parser.add_argument("--lengths", nargs="+", default=list(LENGTHS), choices=LENGTHS)
    parser.add_argument("--in-flight", nargs="+", type=int, default=[128, 256])
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        serve(*args.serve)
        return
    before = harness.machine()
    rows: list[harness.Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models:
            made = make_model(Path(folder) / model.replace(" ", ""), SHAPES[model], args.questions)
            for flight in args.in_flight:
                for lengths in args.lengths:
                    rows += compare(made, model, flight, lengths, args)
    columns = ("model, in flight, lengths", "engine", "new tokens/s", "x vLLM", "ready")
    note = '"x vLLM": of the faster vLLM of the two.'
    title = f"float32, {args.questions * SAMPLES} answers"
    harness.finish(args, "sampler", ABOUT, before, [harness.table(title, columns, rows, note)])


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
    splits = procedural.generate(2000, 10, questions, 0)
    procedural.write(folder / "data", splits, demo.data.vocab_size)
    model = StableLM(ModelConfig(**{**vars(demo.model), **shape}), jax.random.PRNGKey(0))
    with checkpoint.open_manager(folder / "checkpoint", keep=1) as manager:
        checkpoint.save(manager, 0, model, {})
        manager.wait_until_finished()
    checkpoint.copy_tokenizer(folder / "data" / "tokenizer", folder / "checkpoint")
    to_hf(folder / "checkpoint", folder / "hf")
    tokenizer, _ = load_tokenizer(folder / "data" / "tokenizer")
    rows = [encode_prompt(tokenizer, row["prompt"]) for row in splits["test"]]
    (folder / "prompts.json").write_text(json.dumps(rows))
    return folder


def compare(
    folder: Path, model: str, flight: int, lengths: str, args: argparse.Namespace
) -> list[harness.Row]:
    """A row per engine."""
    words = ["-m", "benchmarks.sampler", "--serve"]
    commands = {
        engine: (
            [
                args.python if engine.startswith("vLLM") else sys.executable,
                *(*words, engine, folder, flight, lengths),
            ],
            ENGINES[engine],
        )
        for engine in args.engines
    }
    served, found = harness.served_turns(commands, args.repeats)
    best = max((found[e] for e in found if e.startswith("vLLM")), key=statistics.median)
    return [
        (
            f"{model}, {flight}, {lengths}" if number == 0 else "",
            *(engine, harness.spread(speeds), harness.ratio(speeds, best)),
            f"{served[engine].ready_after:.0f} s",
        )
        for number, (engine, speeds) in enumerate(found.items())
    ]


def new_tokens(number: int, lengths: str) -> list[int]:
    """How many tokens each answer gets."""
    if lengths == "equal":
        return [48] * number
    drawn = np.random.default_rng(0).geometric(1 / 48, number)
    return [int(length) for length in np.clip(drawn, 4, LONGEST)]


def serve(engine: str, folder: str, flight: str, lengths: str) -> None:
    """One engine: warms up, then tells the tokens/s of a pass whenever it is asked."""
    questions = json.loads((Path(folder) / "prompts.json").read_text())
    prompts = [prompt for prompt in questions for _ in range(SAMPLES)]
    limits = new_tokens(len(prompts), lengths)
    prepare = {"vLLM": vllm_pass, "transformers": torch_pass}.get(engine.split(",")[0], jax_pass)
    options = {"waits": True} if engine.endswith("waiting") else {}
    one_pass = prepare(Path(folder), prompts, limits, int(flight), **options)
    one_pass(0)
    turns = iter(range(1, 10**9))

    def measure() -> float:
        begun = time.perf_counter()
        total = one_pass(next(turns))
        if total != sum(limits):
            raise RuntimeError(f"{engine} drew {total} tokens, not {sum(limits)}")
        return total / (time.perf_counter() - begun)

    harness.serve(measure)


def jax_pass(
    folder: Path, prompts: list[list[int]], limits: list[int], flight: int, waits: bool = False
) -> Callable[[int], int]:
    from memphis_jax import checkpoint, sampler
    from memphis_jax.runtime import start_jax

    start_jax()
    model, _ = checkpoint.restore_model(folder / "checkpoint")
    size = flight if waits else len(prompts)

    def one_pass(seed: int) -> int:
        keys = sampler.row_keys(seed, [(i, 0) for i in range(len(prompts))])
        total = 0
        for start in range(0, len(prompts), size):  # all at once, or batch after batch
            part = slice(start, start + size)
            options: dict[str, Any] = {"max_new_tokens": limits[part], "batch_size": flight}
            options |= {"temperature": 1.0, "top_p": 0.8, "eos_id": NO_EOS}
            done = sampler.sample(model, prompts[part], keys[part], **options)
            total += sum(len(one.tokens) for one in done)
        return total

    return one_pass


def vllm_pass(
    folder: Path, prompts: list[list[int]], limits: list[int], flight: int
) -> Callable[[int], int]:
    from memphis_jax.rounds import engine

    llm = engine.load(
        folder / "hf",
        dtype="float32",
        context=CONTEXT,
        model_impl="vllm",
        tensor_parallel_size=1,
        max_num_seqs=flight,
    )
    from vllm import SamplingParams

    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    free = {"temperature": 1.0, "top_p": 0.8, "ignore_eos": True, "detokenize": False}

    def one_pass(seed: int) -> int:
        params = [SamplingParams(**free, max_tokens=limit) for limit in limits]
        done = llm.generate(inputs, params, use_tqdm=False)
        return sum(len(one.outputs[0].token_ids) for one in done)

    return one_pass


def torch_pass(
    folder: Path, prompts: list[list[int]], limits: list[int], flight: int
) -> Callable[[int], int]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()

    def one_pass(seed: int) -> int:
        torch.manual_seed(seed)
        for start in range(0, len(prompts), flight):
            rows, most = prompts[start : start + flight], max(limits[start : start + flight])
            width = max(map(len, rows))
            ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            with torch.inference_mode():
                model.generate(
                    ids,
                    attention_mask=mask,
                    do_sample=True,
                    top_p=0.8,
                    top_k=0,
                    max_new_tokens=most,
                    min_new_tokens=most,
                    pad_token_id=0,
                )
        return sum(limits)  # what is beyond an answer's length does not count

    return one_pass


if __name__ == "__main__":
    main(sys.argv[1:])
