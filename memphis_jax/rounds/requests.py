"""What is asked of an engine, on the command line and by the worker, and what comes back.

No jax, no vLLM.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple


class Request(NamedTuple):
    """One completion to sample."""

    id: str
    sample: int
    prompt: list[int]
    seed: int
    logprobs: bool  # whether each new token's logprob is wanted


class Output(NamedTuple):
    tokens: list[int]  # as sampled, EOS included
    logprobs: list[float]  # of each, untempered; empty where not wanted
    finish_reason: str  # "stop" (EOS or stop text) or "length"


SEEDS = 2**63  # what a JAX key takes

# Every other field that shapes a distribution, at the value that leaves it alone.
NEUTRAL: dict[str, Any] = {
    "n": 1,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
    "ignore_eos": False,
    "skip_special_tokens": False,
    "include_stop_str_in_output": False,
}


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The options that both engines take, with the same defaults."""
    add = parser.add_argument
    add(
        "--questions",
        required=True,
        nargs="+",
        help="JSON Lines {id, prompt}, as `memphis data` writes them",
    )
    add("--out", required=True, type=Path, help="folder for blocks and completions.jsonl")
    add("--num-samples", type=int, default=8, help="answers per question")
    add("--temperature", type=float, default=0.5, help="0 = greedy")
    add("--top-p", type=float, default=0.8, help="share of probability kept")
    add("--max-new-tokens", type=int, default=512, help="EOS included")
    add("--num-questions", type=int, default=0, help="random share of the questions; 0 = all")
    add("--seed", type=int, default=0, help="of the share and of the sampling")
    add("--batch-questions", type=int, default=64, help="questions in a published block")
    add("--replace", action="store_true", help="delete what --out has of other weights or settings")


def check_sampling_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with the parser's error for a value that nothing can be sampled with."""
    for name in ("num_samples", "max_new_tokens", "batch_questions"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be 1 or more")
    if args.num_questions < 0:
        parser.error(f"--num-questions {args.num_questions} is under 0; 0 takes all")
    if not 0 <= args.temperature < float("inf") or not 0 < args.top_p <= 1:
        parser.error(f"--temperature {args.temperature} must be >= 0, --top-p {args.top_p} in 0..1")
    if not 0 <= args.seed < SEEDS:
        parser.error(f"--seed {args.seed} must be from 0 to 2^63 - 1")
