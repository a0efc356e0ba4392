"""`memphis sample`: answers by the embedded JAX sampler, in the files that the vLLM worker writes.

    checkpoint folder + questions.jsonl -> OUT/blocks-0-of-1/*.jsonl -> OUT/completions.jsonl

Started again with the same --out, it goes on after the last published block.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from memphis_jax.data.prompts import STOP, load_tokenizer
from memphis_jax.progress import Progress
from memphis_jax.rounds import blocks
from memphis_jax.rounds.files import sha256_folder
from memphis_jax.rounds.questions import (
    Question,
    encode_questions,
    prompts_sha256,
    read_questions,
    row_number,
)
from memphis_jax.rounds.requests import add_sampling_options, check_sampling_options
from memphis_jax.versions import versions

Row = dict[str, Any]


def sample(argv: Sequence[str]) -> None:
    args = _arguments(argv)
    from memphis_jax import checkpoint
    from memphis_jax.runtime import start_jax

    start_jax(args.dtype)
    rows = read_questions(args.questions, args.num_questions, args.seed)
    if not rows:
        raise ValueError(f"{' '.join(args.questions)}: there is no question to answer")
    tokenizer, eos_id = load_tokenizer(args.checkpoint / "tokenizer")
    context = checkpoint.read_meta(args.checkpoint)["model"]["max_position_embeddings"]
    questions = encode_questions(rows, tokenizer, args.max_new_tokens, context)
    drawing = {
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_new_tokens": args.max_new_tokens,
    }
    meta = {
        "engine": "jax",
        # Without Python's own: a patch release of it decides nothing.
        "versions": {name: text for name, text in versions().items() if name != "python"},
        "model_sha256": sha256_folder(args.checkpoint / "checkpoints"),
        "prompts_sha256": prompts_sha256(questions),
        "seed": args.seed,
        "num_samples": args.num_samples,
        "dtype": args.dtype,
        "batch_questions": args.batch_questions,
        **drawing,
    }
    parts = blocks.chunks(questions, args.batch_questions)
    folder, left = blocks.open_shard(args.out, 0, 1, len(parts), meta, replace=args.replace)
    if left:
        model, _ = checkpoint.restore_model(args.checkpoint)
        progress = Progress(sum(not q.skipped for n in left for q in parts[n]) * args.num_samples)
        settings = {**drawing, "eos_id": eos_id, "dtype": args.dtype}
        settings |= {"batch_size": args.batch_size, "on_progress": progress.add}
        todo = {number: parts[number] for number in left}
        for number, lines in _blocks(model, tokenizer, todo, args, settings):
            blocks.write_block(blocks.block_path(folder, number), _placed(meta), lines)
    count = blocks.gather(args.out, 1, [q.id for q in questions], meta)
    print(f"{args.out / 'completions.jsonl'}: {count} completions", file=sys.stderr)


def _blocks(
    model: Any,
    tokenizer: Tokenizer,
    todo: Mapping[int, Sequence[Question]],
    args: argparse.Namespace,
    settings: dict[str, Any],
) -> Iterator[tuple[int, list[Row]]]:
    """(number, rows) of each block as soon as its last answer is done."""
    from memphis_jax import sampler

    asked = [
        (block, question, number)
        for block, questions in todo.items()
        for question in questions
        if not question.skipped
        for number in range(args.num_samples)
    ]
    left = Counter(block for block, _, _ in asked)
    answers: dict[tuple[str, int], Row] = {}
    yield from ((block, _rows(todo[block], answers, 0)) for block in todo if not left[block])
    if not asked:
        return
    for at, done in sampler.stream(
        model,
        [question.tokens for _, question, _ in asked],
        sampler.row_keys(args.seed, [(row_number(q.id), k) for _, q, k in asked]),
        stops=lambda tokens: STOP in tokenizer.decode(tokens, skip_special_tokens=False),
        **settings,
    ):
        block, question, number = asked[at]
        answers[question.id, number] = _answer(tokenizer, done)
        left[block] -= 1
        if not left[block]:
            yield block, _rows(todo[block], answers, args.num_samples)


def _answer(tokenizer: Tokenizer, done: Any) -> Row:
    text, tokens = tokenizer.decode(done.tokens, skip_special_tokens=False), done.tokens
    if STOP in text:  # the sampler looks between blocks of tokens: count those up to the stop
        while STOP in tokenizer.decode(tokens[:-1], skip_special_tokens=False):
            tokens = tokens[:-1]
    return {
        "text": text.split(STOP)[0],
        "finish_reason": done.finish_reason,
        "num_tokens": len(tokens),
    }


def _rows(
    questions: Sequence[Question], answers: dict[tuple[str, int], Row], num_samples: int
) -> list[Row]:
    """The rows of one block: completions, then what was skipped. Takes them out of `answers`."""
    return [
        *(
            {"id": q.id, "sample": number, **answers.pop((q.id, number))}
            for q in questions
            if not q.skipped
            for number in range(num_samples)
        ),
        *({"id": q.id, "skipped": q.skipped} for q in questions if q.skipped),
    ]


def _placed(meta: Row) -> Row:
    import jax

    devices = [str(device.device_kind) for device in jax.devices()]
    return {**meta, "hardware": {"devices": devices}, "shard": [0, 1]}


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="memphis sample",
        description="Sample answers to questions with JAX from a checkpoint folder. Started again "
        "with the same --out, it goes on after the last published block.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_sampling_options(parser)
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, help="as `memphis train` writes")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of compute")
    add("--batch-size", type=int, default=64, help="sequences decoded at once")
    args = parser.parse_args(argv)
    check_sampling_options(parser, args)
    if args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size} must be 1 or more")
    return args
