"""`memphis parity`: does the trainer give sampled tokens the logprobs that the sampler saw?

Reads the completions that carry `token_ids` and `logprobs`, computes the same logprobs with the
training forward pass, and fails where they are apart: wrong weights, another tokenizer, another
rotary layout or a broken kernel all show here, before a wrong pair trains anything. In greedy
completions each token must also be the trainer's own most probable one, or tie with it: then both
engines write the same text.

Axis letters: B row, T position, V vocabulary.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from memphis_jax.data.prompts import encode_prompt, load_tokenizer
from memphis_jax.rounds.files import write_json
from memphis_jax.rounds.rows import check_out, read_answers, read_questions_by_id

BOUNDS = {"float32": 0.02, "bfloat16": 0.05, "float16": 0.05}  # nats per token
TOKENS = 4096  # rescored at once: 0.8 GB of logits with a vocabulary of 50304
TIES = 0.01  # share of greedy tokens that may be another near-tied one, save in float32


class Rescored(NamedTuple):
    """Of one completion, all [new tokens] float32."""

    theirs: np.ndarray  # the sampler's logprobs
    ours: np.ndarray
    best: np.ndarray  # the trainer's largest logprob at that place


def parity(argv: Sequence[str]) -> None:
    args = _arguments(argv)
    meta, rows = _rescorable(args.completions)
    dtype = args.dtype or meta["dtype"]
    bound = args.bound or BOUNDS[dtype]
    questions = read_questions_by_id(args.questions, ("id", "prompt"))
    for row in rows:
        if row["id"] not in questions:
            raise ValueError(f"{args.completions}: no question has the id {row['id']!r}")
    if not rows:
        raise ValueError(
            f"{args.completions} holds no logprobs to compare: sample with --rescore 64 of `python "
            "-m memphis_jax.rounds.generate` (vLLM)"
        )
    from memphis_jax import checkpoint
    from memphis_jax.runtime import is_first, start_jax
    from memphis_jax.sharding import make_mesh

    start_jax(dtype)
    tokenizer, _ = load_tokenizer(args.checkpoint / "tokenizer")
    prompts = [encode_prompt(tokenizer, questions[row["id"]]["prompt"]) for row in rows]
    model, _ = checkpoint.restore_model(args.checkpoint, mesh=make_mesh())
    found = rescore(model, prompts, rows, dtype)
    greedy = meta["sampling"]["temperature"] == 0
    result = summarise(rows, found, greedy, bound)
    result |= {"dtype": dtype, "bound": bound, "engine": meta["engine"]}
    worst = result["worst"]
    result["worst"]["token"] = tokenizer.decode([worst["token_id"]], skip_special_tokens=False)
    if not np.isfinite(result["mean_abs_difference"]):  # which JSON could not hold
        raise RuntimeError(f"trainer and sampler cannot be compared: {describe(result)}")
    if is_first():
        write_json(args.out, result)
        print(describe(result), file=sys.stderr)
    ties = 0.0 if dtype == "float32" else TIES  # where logits are rounded, near-ties flip
    if result["mean_abs_difference"] > bound or result.get("share_apart", 0.0) > ties:
        raise RuntimeError(f"trainer and sampler are not the same model: {describe(result)}")


def _rescorable(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(meta, the rows that carry logprobs). Raises ValueError where one cannot be rescored."""
    meta, rows = read_answers(path, "an answer", ("id", "sample"))
    sampling = meta.get("sampling")
    if (
        meta.get("dtype") not in BOUNDS
        or "engine" not in meta
        or "temperature" not in (sampling if isinstance(sampling, dict) else {})
    ):
        raise ValueError(
            f"{path}, line 1: the header needs dtype, one of {', '.join(BOUNDS)}, engine, and "
            "sampling with a temperature, as the sampler writes them"
        )
    rows = [row for row in rows if "logprobs" in row]
    for row in rows:
        counts = {name: _length(row.get(name)) for name in ("token_ids", "logprobs")}
        if counts["token_ids"] != counts["logprobs"] or not counts["logprobs"]:
            raise ValueError(
                f"{path}: {row['id']!r}, sample {row['sample']}, has {counts['token_ids']} "
                f"token_ids and {counts['logprobs']} logprobs"
            )
    return meta, rows


def _length(numbers: Any) -> int:
    """How many numbers a list holds; 0 where it is none, or holds anything else."""
    if not isinstance(numbers, list) or not all(isinstance(x, int | float) for x in numbers):
        return 0
    return len(numbers)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="memphis parity",
        description="Rescore sampled tokens with JAX; exit code 1 where the logprobs are apart.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="what was exported")
    parser.add_argument("--completions", required=True, type=Path, help="sampled with --rescore")
    parser.add_argument("--questions", required=True, nargs="+", help="JSON Lines {id, prompt}")
    parser.add_argument("--out", required=True, type=Path, help="JSON to write")
    parser.add_argument("--dtype", choices=tuple(BOUNDS), help="of compute; None = the sampler's")
    parser.add_argument(
        "--bound",
        type=float,
        default=0.0,
        help="mean |difference| per token in nats; 0 = 0.02 in float32, 0.05 else",
    )
    args = parser.parse_args(argv)
    if not 0 <= args.bound < float("inf"):
        parser.error(f"--bound {args.bound} must be 0 (the dtype's own) or more")
    check_out(parser, args.out, [args.completions, *args.questions])
    return args


def rescore(
    model: Any, prompts: Sequence[list[int]], rows: Sequence[dict[str, Any]], dtype: str
) -> list[Rescored]:
    """The trainer's logprobs of each row's `token_ids` after its prompt, on every host."""
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    lengths = [
        len(prompt) + len(row["token_ids"]) for prompt, row in zip(prompts, rows, strict=True)
    ]
    width = -(-max(lengths) // 32) * 32  # one shape for all
    together = max(1, TOKENS // width)
    where = model.norm.scale[...].sharding
    whole = NamedSharding(where.mesh, P()) if isinstance(where, NamedSharding) else None
    score = jax.jit(_scores, static_argnames="dtype", out_shardings=whole)
    found = []
    for start in range(0, len(rows), together):
        tokens = np.zeros((together, width), np.int32)
        batch = list(zip(prompts, rows, lengths, strict=True))[start : start + together]
        for at, (prompt, row, length) in enumerate(batch):
            tokens[at, :length] = [*prompt, *row["token_ids"]]
        scores = score(model, tokens, dtype=dtype)
        chosen, best = (np.asarray(array) for array in scores)  # [B, T - 1]
        for at, (prompt, row, length) in enumerate(batch):
            new = slice(len(prompt) - 1, length - 1)
            theirs = np.array(row["logprobs"], np.float32)
            found.append(Rescored(theirs, chosen[at, new], best[at, new]))
    return found


def _scores(model: Any, tokens: Any, dtype: str) -> tuple[Any, Any]:
    """tokens [B, T] -> (logprob of each next token, the largest logprob there), [B, T - 1] both."""
    import jax
    import jax.numpy as jnp

    # What follows a row's end is causal future and changes nothing before it.
    logprobs = jax.nn.log_softmax(model.logits(tokens[:, :-1], dtype=dtype), axis=-1)
    chosen = jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
    return chosen, logprobs.max(-1)


def summarise(
    rows: Sequence[dict[str, Any]], found: Sequence[Rescored], greedy: bool, bound: float
) -> dict[str, Any]:
    """Mean and largest |difference| per token, the worst token, and for greedy rows agreement.

    `share_apart`: greedy tokens whose logprob is over 2 * bound below the trainer's own choice.
    """
    differences = [np.abs(one.theirs - one.ours) for one in found]
    at = int(np.argmax([d.max() for d in differences]))
    token = int(differences[at].argmax())
    result: dict[str, Any] = {
        "completions": len(rows),
        "tokens": sum(map(len, differences)),
        "mean_abs_difference": float(np.concatenate(differences).mean()),
        "max_abs_difference": float(differences[at].max()),
        "worst": {
            "id": rows[at]["id"],
            "sample": rows[at]["sample"],
            "position": token,
            "token_id": rows[at]["token_ids"][token],
            "theirs": float(found[at].theirs[token]),
            "ours": float(found[at].ours[token]),
        },
    }
    if greedy:
        gaps = [one.best - one.ours for one in found]
        every = np.concatenate(gaps)
        result |= {
            "identical": sum(bool((gap == 0).all()) for gap in gaps),
            "largest_gap": float(every.max()),
            "share_apart": float((every > 2 * bound).mean()),
        }
    return result


def describe(result: dict[str, Any]) -> str:
    """One line for a person."""
    worst = result["worst"]
    line = (
        f"mean |logprob difference| {result['mean_abs_difference']:.2g} per token (bound "
        f"{result['bound']:g}) over {result['completions']} completions, {result['tokens']} "
        f"tokens; worst: {worst['id']} sample {worst['sample']}, new token {worst['position']} "
        f"{worst['token']!r}: {result['engine']} {worst['theirs']:.4f}, JAX {worst['ours']:.4f}"
    )
    if "identical" in result:
        line += (
            f"; greedy text identical in {result['identical']} of {result['completions']}, "
            f"largest gap to JAX's own choice {result['largest_gap']:.2g}, over "
            f"{2 * result['bound']:g} in {100 * result['share_apart']:.2g} % of tokens"
        )
    return line
