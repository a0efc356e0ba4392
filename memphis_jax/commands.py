"""`memphis train`: reads config and files; what it calls takes plain values."""

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memphis_jax import config as configs
from memphis_jax.data.prompts import load_tokenizer
from memphis_jax.rounds.files import sha256_file, sha256_folder


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
        "--data",
        required=True,
        type=Path,
        help="sft: a folder of `memphis data`, or rows {prompt, rationale, target}; "
        "rank: pairs.jsonl",
    )
    parser.add_argument(
        "--init", type=Path, help="checkpoint folder to start from; without: random weights"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="folder with tokenizer.json; default: that of --init, or else of the --data folder",
    )
    args, overrides = parser.parse_known_args(argv)
    config = configs.load(args.config, overrides)
    from memphis_jax import checkpoint
    from memphis_jax import train as training
    from memphis_jax.runtime import start_jax

    start_jax()

    settings = config.sft if args.phase == "sft" else config.rank
    tokenizer_folder = _tokenizer_folder(args)
    tokenizer, eos_id = load_tokenizer(tokenizer_folder)
    batches, data_sha256 = _batches(args, settings, config.seed, tokenizer, eos_id)
    state = _first_state(args.init, config, settings, tokenizer.get_vocab_size())
    identity = {
        "phase": args.phase,
        "settings": dataclasses.asdict(settings),
        "compute": dataclasses.asdict(config.compute),
        "seed": config.seed,
        "data_sha256": data_sha256,
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


def _tokenizer_folder(args: argparse.Namespace) -> Path:
    if args.tokenizer:
        return args.tokenizer
    if args.init:
        return args.init / "tokenizer"
    if args.data.is_dir():
        return args.data / "tokenizer"
    raise configs.ConfigError("random weights (no --init) need --tokenizer FOLDER")


def _batches(
    args: argparse.Namespace,
    settings: configs.PhaseConfig,
    seed: int,
    tokenizer: Any,
    eos_id: int,
) -> tuple[Any, str]:
    """(the loader of the phase, the hash of its data)."""
    from memphis_jax.data import examples, loader

    sizes: dict[str, Any] = {
        "seq_len": settings.seq_len,
        "batch_size": settings.batch_size,
        "accumulation": settings.accumulation,
        "epochs": settings.epochs,
        "seed": seed,
    }
    if args.phase == "sft" and args.data.is_dir():
        examples.check_built(args.data, _tokenizer_folder(args), settings.seq_len)
        built, manifest = examples.open_built(args.data)
        print(f"{args.data}: {len(built)} examples", file=sys.stderr, flush=True)
        slots = (built.lengths - 1).tolist()
        return loader.sft_loader(built, slots=slots, **sizes), manifest["sft_sha256"]
    reader = examples.read_cot_examples if args.phase == "sft" else examples.read_groups
    items, dropped = reader(args.data, tokenizer, eos_id, settings.seq_len)
    _report_rows(args.data, len(items), dropped)
    make_loader: Any = loader.sft_loader if args.phase == "sft" else loader.rank_loader
    return make_loader(items, **sizes), sha256_file(args.data)


def _report_rows(path: Path, kept: int, dropped: Counter[str]) -> None:
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
