"""The commands that compute with JAX on a checkpoint: `memphis train` and `memphis sample`.

Config and files are read here; what they call takes plain values.
"""

import argparse
import dataclasses
import sys
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memphis_jax import config as configs
from memphis_jax.data.prompts import STOP, encode_prompt, load_tokenizer
from memphis_jax.rounds.files import read_jsonl, sha256_file, sha256_folder, write_jsonl
from memphis_jax.versions import versions


def train(argv: Sequence[str]) -> None:
    """One training phase: the stage behind `memphis rounds`."""
    parser = argparse.ArgumentParser(
        prog="memphis train",
        description="Train one phase into --workdir; started again, it resumes from there.",
        epilog="Any config field can be set: --config.sft.optimizer.learning_rate=1e-5",
    )
    parser.add_argument("--config", required=True, help="configs/*.py, or a saved config.json")
    parser.add_argument("--phase", required=True, choices=("sft", "rank"))
    parser.add_argument("--workdir", required=True, type=Path, help="checkpoints and metrics")
    parser.add_argument(
        "--data", required=True, help="sft: rows {prompt, rationale, target}; rank: pairs.jsonl"
    )
    parser.add_argument(
        "--init", type=Path, help="checkpoint folder to start from; without: random weights"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="folder with tokenizer.json; default: that of --init"
    )
    args, overrides = parser.parse_known_args(argv)
    config = configs.load(args.config, overrides)
    from memphis_jax import checkpoint
    from memphis_jax import train as training
    from memphis_jax.data import examples, loader
    from memphis_jax.runtime import start_jax

    start_jax()

    settings = config.sft if args.phase == "sft" else config.rank
    tokenizer_folder = args.tokenizer or (args.init / "tokenizer" if args.init else None)
    if tokenizer_folder is None:
        raise configs.ConfigError("random weights (no --init) need --tokenizer FOLDER")
    tokenizer, eos_id = load_tokenizer(tokenizer_folder)
    reader = examples.read_cot_examples if args.phase == "sft" else examples.read_groups
    items, dropped = reader(args.data, tokenizer, eos_id, settings.seq_len)
    _report_rows(args.data, len(items), dropped)
    make_loader: Any = loader.sft_loader if args.phase == "sft" else loader.rank_loader
    batches = make_loader(
        items,
        seq_len=settings.seq_len,
        batch_size=settings.batch_size,
        accumulation=settings.accumulation,
        epochs=settings.epochs,
        seed=config.seed,
    )
    state = _first_state(args.init, config, settings, tokenizer.get_vocab_size())
    identity = {
        "phase": args.phase,
        "settings": dataclasses.asdict(settings),
        "compute": dataclasses.asdict(config.compute),
        "seed": config.seed,
        "data_sha256": sha256_file(args.data),
        "tokenizer_sha256": sha256_file(tokenizer_folder / "tokenizer.json"),
        "start": sha256_folder(args.init / "checkpoints")
        if args.init
        else dataclasses.asdict(config.model),
    }
    training.run(
        args.phase,
        args.workdir,
        batches,
        state,
        settings=settings,
        compute=config.compute,
        identity=identity,
    )
    checkpoint.copy_tokenizer(tokenizer_folder, args.workdir)


def _report_rows(path: str, kept: int, dropped: Counter[str]) -> None:
    total = kept + sum(dropped.values())
    reasons = "".join(f"; dropped {count}: {reason}" for reason, count in dropped.most_common())
    print(f"{path}: {kept} of {total} rows{reasons}", file=sys.stderr, flush=True)


def _first_state(
    init: Path | None, config: configs.RunConfig, settings: configs.PhaseConfig, vocabulary: int
) -> Any:
    import jax

    from memphis_jax import checkpoint
    from memphis_jax import train as training
    from memphis_jax.model import StableLM

    if init:
        model, _ = checkpoint.restore_model(init)
    else:
        model = StableLM(config.model, jax.random.PRNGKey(config.seed))
    if vocabulary > model.config.vocab_size:
        raise configs.ConfigError(
            f"the tokenizer has {vocabulary} tokens, model.vocab_size is {model.config.vocab_size}"
        )
    state = training.init_state(model, settings, config.seed)
    if init and settings.keep_optimizer_state:
        state = training.carry_optimizer(init, state, settings)
    return state


class _Progress:
    """Rows and tokens per second: a live line on a terminal, a line per tenth elsewhere."""

    def __init__(self, total: int):
        self._total, self._rows, self._tokens, self._shown = total, 0, 0, 0
        self._start = time.perf_counter()

    def add(self, rows: int, tokens: int) -> None:
        self._rows, self._tokens = self._rows + rows, self._tokens + tokens
        terminal = sys.stderr.isatty()
        if not terminal and self._rows - self._shown < self._total / 10:
            return
        self._shown = self._rows
        seconds = time.perf_counter() - self._start
        left = seconds * (self._total / self._rows - 1)
        line = f"sampled {self._rows}/{self._total}  {self._tokens / seconds:.0f} tokens/s"
        end = "\r" if terminal and self._rows < self._total else "\n"
        print(f"{line}  {left:.0f} s left ", end=end, file=sys.stderr, flush=True)


def sample(argv: Sequence[str]) -> None:
    """Completions for a file of questions by the embedded JAX sampler."""
    args = _sample_arguments(argv)
    from memphis_jax import checkpoint, sampler
    from memphis_jax.runtime import start_jax

    start_jax()
    questions = _read_questions(args.questions, args.num_questions, args.seed)
    model, _ = checkpoint.restore_model(args.checkpoint)
    tokenizer, eos_id = load_tokenizer(args.checkpoint / "tokenizer")
    encoded = {row["id"]: encode_prompt(tokenizer, row["prompt"]) for row in questions}
    rows = [(name, number) for name in encoded for number in range(args.num_samples)]
    drawing = {
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_new_tokens": args.max_new_tokens,
    }
    completions = sampler.sample(
        model,
        [encoded[name] for name, _ in rows],
        sampler.row_keys(args.seed, [(zlib.crc32(str(n).encode()), k) for n, k in rows]),
        eos_id=eos_id,
        batch_size=args.batch_size,
        stops=lambda tokens: STOP in tokenizer.decode(tokens, skip_special_tokens=False),
        dtype=args.dtype,
        on_progress=_Progress(len(rows)).add,
        **drawing,
    )
    header = {
        "engine": "jax",
        "versions": versions(),
        "model_sha256": sha256_folder(args.checkpoint / "checkpoints"),
        "seed": args.seed,
        "num_samples": args.num_samples,
        "dtype": args.dtype,
        **drawing,
    }
    lines = [
        {
            "id": name,
            "sample": number,
            "text": tokenizer.decode(done.tokens, skip_special_tokens=False).split(STOP)[0],
            "finish_reason": done.finish_reason,
            "num_tokens": len(done.tokens),
        }
        for (name, number), done in zip(rows, completions, strict=True)
    ]
    write_jsonl(args.out, [{"meta": header}, *lines])


def _sample_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="memphis sample",
        description="Sample answers to questions with JAX from a checkpoint folder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="as `memphis train` writes")
    parser.add_argument("--questions", required=True, nargs="+", help="JSON Lines {id, prompt}")
    parser.add_argument("--out", required=True, type=Path, help="completions.jsonl to write")
    parser.add_argument("--num-samples", type=int, default=8, help="answers per question")
    parser.add_argument("--temperature", type=float, default=0.5, help="0 = greedy")
    parser.add_argument("--top-p", type=float, default=0.8, help="share of probability kept")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="EOS included")
    parser.add_argument("--batch-size", type=int, default=64, help="sequences decoded at once")
    parser.add_argument("--num-questions", type=int, default=0, help="random share; 0 = all")
    parser.add_argument("--seed", type=int, default=0, help="of the share and of the sampling")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of compute"
    )
    return parser.parse_args(argv)


def _read_questions(paths: Sequence[str], limit: int, seed: int) -> list[dict[str, Any]]:
    """The questions of several files, or `limit` of them drawn by `seed`, in the files' order."""
    questions = [row for path in paths for row in read_jsonl(path)]
    if len({row["id"] for row in questions}) != len(questions):
        raise ValueError(f"{' '.join(paths)}: ids are not unique")
    if 0 < limit < len(questions):
        chosen = np.random.default_rng(seed).permutation(len(questions))[:limit]
        questions = [questions[i] for i in sorted(chosen)]
    return questions
