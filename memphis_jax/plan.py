"""`memphis plan`: does a config fit a TPU slice, how fast can it be, what will the recipe take.

The real SFT and rank steps are compiled for the slice by the TPU's own compiler, which needs no
TPU; what it says is compared with the chip's published figures. Nothing is created or reserved.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from memphis_jax import config as configs
from memphis_jax import plan_table
from memphis_jax.config import ConfigError, RunConfig
from memphis_jax.plan_chips import CHIPS, EXAMPLES, parse_slice
from memphis_jax.plan_compile import GIB, Compiled, compile_step
from memphis_jax.plan_search import Candidate, Job, Search

PHASES = ("sft", "rank")
# What a recipe is assumed to hold where neither --data nor --tokens says it: TinyCoT's ingredients
# as this project has them (docs/data.md: 21,699 rows, 2.45 M tokens), 5,000 conversations of
# reddit-instruct (card) and about 4,700 of oasst2_curated at 500 tokens each (a guess).
TOKENS = 7_300_000
PAIRS = 21_700  # one per question of TinyCoT (a guess)
TOKENS_PER_PAIR = 512  # chosen, rejected and ground truth together (a guess)
MFU = 0.4  # at which hours are given beside the bound: what well-run TPU jobs reach


class Work(NamedTuple):
    """Optimizer steps of a recipe, and where the numbers come from."""

    sft_steps: int
    rank_steps: int  # of all rounds
    told: str


def plan(argv: Sequence[str]) -> None:
    """The command; see --help."""
    parser = argparse.ArgumentParser(
        prog="memphis plan",
        description="Compile a config's SFT and rank steps for TPU slices, without a TPU: does it "
        "fit, with which mesh, micro-batch and remat policy, and how fast could it be at best.",
        epilog=f"Slices: GENERATION:SHAPE, generations {', '.join(CHIPS)}; e.g. {EXAMPLES}. "
        "A 3B step takes the compiler minutes and 1-2 GB; results are kept, the same command goes "
        "on where it was stopped. " + configs.overrides_help("sft.batch_size=64"),
    )
    parser.add_argument("--config", required=True, help="configs/*.py, or a saved config.json")
    parser.add_argument(
        "--topology", required=True, action="append", metavar="SLICE", help="may be given again"
    )
    parser.add_argument("--slices", type=int, default=1, help="that many of each, over the network")
    parser.add_argument("--phase", choices=PHASES, help="only this one")
    parser.add_argument(
        "--as-configured",
        action="store_true",
        help="the config's own mesh, accumulation and remat; without: the best are searched for",
    )
    parser.add_argument(
        "--compiles", type=int, default=4, help="most per slice and phase (default 4)"
    )
    parser.add_argument("--data", type=Path, help="folder of `memphis data`: the recipe's size")
    parser.add_argument("--tokens", type=int, help="SFT tokens of an epoch instead")
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"of a round (default {PAIRS:,})")
    parser.add_argument(
        "--tokens-per-pair",
        type=int,
        default=TOKENS_PER_PAIR,
        help=f"chosen, rejected and ground truth together (default {TOKENS_PER_PAIR})",
    )
    parser.add_argument("--price-per-chip-hour", type=float, help="for the cost, in any currency")
    parser.add_argument("--markdown", action="store_true", help="tables as docs/plan.md has them")
    args, overrides = parser.parse_known_args(argv)
    for name in ("slices", "compiles", "pairs", "tokens_per_pair", "tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be 1 or more")
    config = configs.load(args.config, overrides)
    slices = [parse_slice(name) for name in args.topology]  # all names before the first compile
    work = recipe(config, args.data, args.tokens, args.pairs)
    phases = (args.phase,) if args.phase else PHASES
    jobs = [
        Job(config, phase, where, args.slices, args.tokens_per_pair)
        for where in slices
        for phase in phases
    ]
    own = [as_configured(job) for job in jobs] if args.as_configured else []
    searches = [Search(job, _Say(args.compiles)) for job in jobs]
    best: list[Candidate | None] = []
    for at, search in enumerate(searches):
        if own:
            search.found[own[at]] = _Say(1)(search.job, own[at])
            best.append(own[at] if search.found[own[at]].fits else None)
        else:
            best.append(search.run(args.compiles))
    print(
        plan_table.render(
            searches,
            best,
            work=work,
            mfu=MFU,
            price=args.price_per_chip_hour,
            markdown=args.markdown,
        )
    )


def as_configured(job: Job) -> Candidate:
    """The candidate that the config describes. Raises ConfigError where it does not divide."""
    try:
        return job.candidate(job.config.mesh, job.settings.accumulation, job.config.compute.remat)
    except ConfigError as error:
        raise ConfigError(f"{job.name}: {error}") from None


def recipe(config: RunConfig, data: Path | None, tokens: int | None, pairs: int) -> Work:
    """How many steps the whole recipe takes: from a built folder, given numbers, or assumptions."""
    rounds = config.rounds.num_rounds
    rank_steps = rounds * config.rank.epochs * math.ceil(pairs / config.rank.batch_size)
    told = f"{pairs:,} pairs in each of {rounds} rounds" + (" (assumed)" if pairs == PAIRS else "")
    if data is not None:
        from memphis_jax.data.examples import read_manifest

        total = read_manifest(data)["totals"]["tokens"]
        source = str(data)
    elif tokens is not None:
        total, source = tokens, "--tokens"
    else:
        total, source = TOKENS, "assumed"
    rows = math.ceil(total / config.sft.seq_len)
    sft_steps = config.sft.epochs * math.ceil(rows / config.sft.batch_size)
    return Work(sft_steps, rank_steps, f"{total:,} SFT tokens per epoch ({source}), {told}")


class _Say:
    """Compiles a candidate and says so on standard error."""

    def __init__(self, most: int):
        self._most, self._count = most, 0

    def __call__(self, job: Job, candidate: Candidate) -> Compiled:
        self._count += 1
        line = f"{job.name} {job.phase} [{self._count}/{self._most}] {candidate}"
        print(f"{line} ...", end="", file=sys.stderr, flush=True)
        start = time.perf_counter()
        found = compile_step(*job.request(candidate))
        answer = "fits" if found.fits else "does not fit"
        print(
            f" {answer}: {found.peak / GIB:.1f} of {found.limit / GIB:.1f} GB, "
            f"{time.perf_counter() - start:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        return found
