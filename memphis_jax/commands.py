"""`memphis train`: reads config and files; what it calls takes plain values."""

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memphis_jax import config as configs
from memphis_jax.data.prompts import load_tokenizer
from memphis_jax.rounds.files import sha256_file, sha256_folder


def train(argv: Sequence[str]) -> None:
    """One training phase: the stage behind `memphis rounds`."""
    args, overrides = _arguments(argv)
    config = configs.load(args.config, overrides)
    _check_places(args, config)
    from memphis_jax import checkpoint
    from memphis_jax import train as training
    from memphis_jax.runtime import is_first, start_jax
    from memphis_jax.sharding import make_mesh

    start_jax(config.compute.dtype)
    settings = config.sft if args.phase == "sft" else config.rank
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    model = _model_config(args.init, config)
    configs.check_mesh(model, dict(mesh.shape), {args.phase: settings})
    tokenizer_folder = _tokenizer_folder(args)
    tokenizer, eos_id = load_tokenizer(tokenizer_folder)
    if (vocabulary := tokenizer.get_vocab_size()) > model.vocab_size:
        raise configs.ConfigError(
            f"the tokenizer has {vocabulary} tokens, model.vocab_size is {model.vocab_size}"
        )
    _check_eos(eos_id, model, tokenizer_folder, converted=bool(args.init))
    batches, data_sha256 = _batches(args, settings, config.seed, tokenizer, eos_id, mesh)
    identity = {
        "phase": args.phase,
        "settings": _without(
            settings, "accumulation", "log_every", "checkpoint_every", "keep_checkpoints"
        ),
        "compute": _without(config.compute, "remat", "attention", "logprob_chunk", "profile_step"),
        "seed": config.seed,
        "data_sha256": data_sha256,
        "tokenizer_sha256": sha256_file(tokenizer_folder / "tokenizer.json"),
        "eos_id": eos_id,
        "start": sha256_folder(args.init / "checkpoints")
        if args.init
        else dataclasses.asdict(config.model),
    }
    if is_first() and not (args.workdir / "tokenizer").exists():  # an export needs it at any time
        checkpoint.copy_tokenizer(tokenizer_folder, args.workdir)
    training.run(
        args.phase,
        args.workdir,
        batches,
        _first_state(args.init, config, settings, mesh),
        settings=settings,
        compute=config.compute,
        identity=identity,
        mesh=mesh,
    )
    if is_first():  # whole, also where the first copy was cut off
        checkpoint.copy_tokenizer(tokenizer_folder, args.workdir)


def _arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="memphis train",
        description="Train one phase into --workdir; started again, it resumes from there.",
        epilog=configs.overrides_help("sft.optimizer.learning_rate=1e-5") + " On several "
        "hosts: the same command on each, JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and "
        "JAX_PROCESS_ID set, and --workdir on storage that all share. Exit code 75: SIGTERM, all "
        "is saved (so it is after Ctrl-C, 130); 76: another host was lost; after each of them the "
        "same command goes on.",
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
    return parser.parse_known_args(argv)


def _check_places(args: argparse.Namespace, config: configs.RunConfig) -> None:
    """Raises ConfigError for what can be said of the folders before JAX starts."""
    if config.start.hf_folder and not args.init:
        raise configs.ConfigError(
            f"start.hf_folder = {config.start.hf_folder!r} without --init: convert it with `python "
            "-m convert from-hf HF_FOLDER DIR` and give --init DIR, or set "
            "--config.start.hf_folder='' for random weights"
        )
    for name in ("workdir", "data", "init"):
        if re.match(r"\w+:/", text := str(getattr(args, name))):
            raise configs.ConfigError(f"--{name} {text}: mount the bucket and give the path there")
    if not args.data.exists():
        raise configs.ConfigError(
            f"--data {args.data}: no such file or folder; `memphis data --out DIR` makes one for "
            "sft, `memphis pairs` one for rank"
        )


def _without(section: Any, *names: str) -> dict[str, Any]:
    """The fields of a section save those that fit the run to a machine, which may change."""
    return {k: v for k, v in dataclasses.asdict(section).items() if k not in names}


def _check_eos(eos_id: int, model: configs.ModelConfig, folder: Path, converted: bool) -> None:
    """Other engines stop at the id in the exported config.json: it has to be the one trained."""
    if eos_id == model.eos_token_id:
        return
    told = f"{folder}: its EOS token has id {eos_id}, the model's eos_token_id is "
    told += f"{model.eos_token_id}"
    if not converted:
        raise configs.ConfigError(f"{told}: set --config.model.eos_token_id={eos_id}")
    from memphis_jax.runtime import is_first

    if is_first():
        told += "; answers end with the former, which other engines have to be told after an export"
        print(told, file=sys.stderr, flush=True)


def _model_config(init: Path | None, config: configs.RunConfig) -> configs.ModelConfig:
    from memphis_jax import checkpoint

    return checkpoint.read_model_config(checkpoint.read_meta(init), init) if init else config.model


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
    mesh: Any,
) -> tuple[Any, str]:
    """(the loader of this host's share of the phase, the hash of its data)."""
    import jax

    from memphis_jax.data import examples, loader
    from memphis_jax.sharding import host_share, row_shards

    process = jax.process_index()
    index, count = host_share(mesh, process)

    sizes: dict[str, Any] = {
        "seq_len": settings.seq_len,
        "batch_size": settings.batch_size,
        "accumulation": settings.accumulation,
        "epochs": settings.epochs,
        "seed": seed,
        "process_index": index,
        "process_count": count,
    }
    if args.phase == "rank":
        sizes["row_multiple"] = len(row_shards(mesh)[process])
    if args.phase == "sft" and args.data.is_dir():
        examples.check_built(args.data, _tokenizer_folder(args), settings.seq_len)
        built, manifest = examples.open_built(args.data)
        if process == 0:
            print(f"{args.data}: {len(built)} examples", file=sys.stderr, flush=True)
        slots = (built.lengths - 1).tolist()
        return loader.sft_loader(built, slots=slots, **sizes), manifest["sft_sha256"]
    reader = examples.read_cot_examples if args.phase == "sft" else examples.read_groups
    items, dropped = reader(args.data, tokenizer, eos_id, settings.seq_len)
    reasons = "".join(f"; dropped {count}: {reason}" for reason, count in dropped.most_common())
    rows = f"{args.data}: {len(items)} of {len(items) + dropped.total()} rows{reasons}"
    if not items:
        raise configs.ConfigError(f"{rows}; there is nothing to train on")
    if process == 0:
        print(rows, file=sys.stderr, flush=True)
    make_loader: Any = loader.sft_loader if args.phase == "sft" else loader.rank_loader
    return make_loader(items, **sizes), sha256_file(args.data)


def _first_state(
    init: Path | None, config: configs.RunConfig, settings: configs.PhaseConfig, mesh: Any
) -> Any:
    import jax

    from memphis_jax import checkpoint
    from memphis_jax.model import StableLM, abstract
    from memphis_jax.sharding import state_sharding
    from memphis_jax.train import carry_optimizer
    from memphis_jax.train_step import init_state

    if init:
        model, _ = checkpoint.restore_model(init, mesh=mesh)
    else:  # each device draws its own part; the values do not depend on the mesh
        shardings = state_sharding(abstract(config.model), mesh)
        draw = jax.jit(lambda key: StableLM(config.model, key), out_shardings=shardings)
        model = draw(jax.random.PRNGKey(config.seed))
    state = init_state(model, settings, config.seed, mesh)
    if init and settings.keep_optimizer_state:
        state = carry_optimizer(init, state, settings)
    return state
