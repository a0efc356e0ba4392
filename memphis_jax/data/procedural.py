"""Word problems made from a seed: the embedded default data, so `make demo` downloads nothing.

Each problem of the task "sums" is a sum of four or five steps told as a story. Its rationale is
either terse or step by step, and nothing in the prompt says which: a model that imitates both can
only get better by preferring the more reliable one, which is what the ranking rounds are for. The
task "more" compares what two people have: a second skill, to be learnt on top of the first one.

Also trains the small tokenizer that goes with the data. Imports `rounds.files` and, for the
tokenizer, `tokenizers`; no jax.

    python -m memphis_jax.data.procedural --out DIR --seed 0 --train 20000 --test 500
"""

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from memphis_jax.rounds.files import new_folder

SHE = ("Mia", "Ann", "Eva", "Zoe")
HE = ("Tom", "Ben", "Max", "Leo")
THINGS = ("shell", "coin", "stamp", "pen", "card", "bead")
ADDS = ("finds {n} more", "gets {n} more", "buys {n} more")
SUBTRACTS = ("loses {n}", "gives away {n}")
DOUBLES = "Then the number doubles."

LARGEST_OPERAND = 9
LARGEST_RESULT = 16
TERSE_SHARE = 0.6
# Far below the 1.4 million different sums, so that drawing a new one stays quick.
MOST_ROWS = 500_000

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
SMALLEST_VOCABULARY = 258  # the 256 bytes and the two tokens above
TEMPLATE_TEXTS = ("### User:\n", "\n### Rationale:\n", "\n### Answer:\n", "### Assistant:\n")
FILES = ("train.jsonl", "validation.jsonl", "test.jsonl", "tokenizer")


class Sum(NamedTuple):
    """A start and the steps ("+" | "-" | "x", operand) that follow; a doubling is ("x", 2)."""

    start: int
    steps: tuple[tuple[str, int], ...]


def generate(
    num_train: int, num_validation: int, num_test: int, seed: int, task: str = "sums"
) -> dict[str, list[dict[str, str]]]:
    """Rows {id, prompt, rationale, target, source} of the three splits, of one of `TASKS`.

    A pure function of the arguments. No arithmetic (the numbers of every step) occurs twice, inside
    a split or across, so no prompt does; of "more", no two people with their numbers. Raises
    ValueError for a negative count or for more than `MOST_ROWS` rows.
    """
    counts = {"train": num_train, "validation": num_validation, "test": num_test}
    if min(counts.values()) < 0 or sum(counts.values()) > MOST_ROWS:
        raise ValueError(f"cannot make {counts} rows: ask for 0 or more each, {MOST_ROWS} in all")
    rng = random.Random(seed)
    seen: set[str] = set()
    splits: dict[str, list[dict[str, str]]] = {}
    for split, count in counts.items():
        rows: list[dict[str, str]] = []
        while len(rows) < count:
            row = TASKS[task](rng, seen)
            if row:
                name = (
                    f"{split}-{len(rows):06d}"
                    if task == "sums"
                    else f"{task}-{split}-{len(rows):06d}"
                )
                rows.append({"id": name, **row, "source": "procedural"})
        splits[split] = rows
    return splits


def sum_row(rng: random.Random, seen: set[str]) -> dict[str, str] | None:
    """A sum told as a story; None for one that was drawn before."""
    problem = draw_sum(rng)
    # Not the sum itself: 16 doubled and 16 + 16 are the same arithmetic.
    arithmetic = step_by_step(problem)
    if arithmetic in seen:
        return None
    seen.add(arithmetic)
    style = terse if rng.random() < TERSE_SHARE else step_by_step
    prompt = tell(problem, rng)
    return {"prompt": prompt, "rationale": style(problem), "target": str(results(problem)[-1])}


def more_row(rng: random.Random, seen: set[str]) -> dict[str, str] | None:
    """Two people, one of whom has more of a thing, and by how many: "9 - 4 = 5."."""
    less, more = sorted(rng.sample(range(1, LARGEST_RESULT + 1), 2))
    rich, poor = rng.sample(SHE + HE, 2)
    told = [f"{rich} has {more}", f"{poor} has {less}"]
    rng.shuffle(told)
    if str(told) in seen:
        return None
    seen.add(str(told))
    thing = rng.choice(THINGS)
    sentences = [f"{text} {thing if text.endswith(' 1') else thing + 's'}." for text in told]
    question = f"How many more {thing}s does {rich} have than {poor}?"
    rationale = f"{more} - {less} = {more - less}."
    prompt = " ".join([*sentences, question])
    return {"prompt": prompt, "rationale": rationale, "target": str(more - less)}


TASKS = {"sums": sum_row, "more": more_row}


def draw_sum(rng: random.Random) -> Sum:
    """Four or five steps whose results all lie between 1 and `LARGEST_RESULT`."""
    start = rng.randint(1, LARGEST_OPERAND)
    num_steps = rng.randint(4, 5)
    steps: list[tuple[str, int]] = []
    value = start
    while len(steps) < num_steps:
        operator = rng.choice("+-x")
        operand = 2 if operator == "x" else rng.randint(1, LARGEST_OPERAND)
        after = apply(value, operator, operand)
        if 1 <= after <= LARGEST_RESULT:
            steps.append((operator, operand))
            value = after
    return Sum(start, tuple(steps))


def apply(value: int, operator: str, operand: int) -> int:
    """`value` after one step."""
    return {"+": value + operand, "-": value - operand, "x": value * operand}[operator]


def results(problem: Sum) -> list[int]:
    """The value after each step."""
    values = [problem.start]
    for operator, operand in problem.steps:
        values.append(apply(values[-1], operator, operand))
    return values[1:]


def tell(problem: Sum, rng: random.Random) -> str:
    """The sum as a story that ends with the question."""
    name = rng.choice(SHE + HE)
    pronoun = "She" if name in SHE else "He"
    thing = rng.choice(THINGS)
    sentences = [f"{name} has {problem.start} {thing if problem.start == 1 else thing + 's'}."]
    for operator, operand in problem.steps:
        if operator == "x":
            sentences.append(DOUBLES)
        else:
            phrase = rng.choice(ADDS if operator == "+" else SUBTRACTS)
            sentences.append(f"{pronoun} {phrase.format(n=operand)}.")
    sentences.append(f"How many {thing}s does {name} have now?")
    return " ".join(sentences)


def terse(problem: Sum) -> str:
    """The computation without a single result: "7 + 5 - 3, doubled, + 2."."""
    text = str(problem.start)
    for operator, operand in problem.steps:
        if operator == "x":
            text += ", doubled"
        else:
            text += f"{',' if text.endswith('doubled') else ''} {operator} {operand}"
    return text + "."


def step_by_step(problem: Sum) -> str:
    """Every step with its result: "7 + 5 = 12. 12 - 3 = 9. 9 + 9 = 18."."""
    sentences = []
    before = problem.start
    for (operator, operand), after in zip(problem.steps, results(problem), strict=True):
        step = f"{before} + {before}" if operator == "x" else f"{before} {operator} {operand}"
        sentences.append(f"{step} = {after}.")
        before = after
    return " ".join(sentences)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens.

    Decoding gives exactly the text that was encoded. A frequent number is one token. Token 0
    ends a text, token 1 is padding. Raises ValueError for a vocabulary too small to hold every
    byte.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size is {vocab_size}: it must be at least {SMALLEST_VOCABULARY}")
    tokenizer = Tokenizer(models.BPE())
    # Tokens may span words, which halves the length of examples, but not a comma, the end of a
    # sentence or of a line: else one token would tell several steps at once, too rarely each to be
    # learnt.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex(r"[.,?\n]+ *"), "merged_with_previous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the folder that transformers' `AutoTokenizer.from_pretrained` reads."""
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "pad_token": PADDING,
    }
    config = special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for name, content in (("special_tokens_map", special), ("tokenizer_config", config)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write(out: Path, splits: dict[str, list[dict[str, str]]], vocab_size: int) -> Tokenizer:
    """Write `{split}.jsonl` and `tokenizer/`, trained on the train split, to the folder `out`.

    The folder appears in one rename. Earlier output of this function is replaced. Raises
    FileExistsError when `out` holds anything else.
    """
    if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - set(FILES)):
        raise FileExistsError(
            f"{out} holds other files than {', '.join(FILES)}: choose another folder"
        )
    # The pieces apart, as the prompt templates join them: no token shall span two of them.
    texts = [row[key] for row in splits["train"] for key in ("prompt", "rationale", "target")]
    texts += TEMPLATE_TEXTS * len(splits["train"])
    tokenizer = train_tokenizer(texts, vocab_size)

    with new_folder(out) as partial:
        for split, rows in splits.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (partial / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        save_tokenizer(tokenizer, partial / "tokenizer")
    return tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m memphis_jax.data.procedural",
        description="Write procedural word problems and their tokenizer.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=20_000, help="rows of train.jsonl")
    parser.add_argument("--validation", type=int, default=500, help="rows of validation.jsonl")
    parser.add_argument("--test", type=int, default=500, help="rows of test.jsonl")
    parser.add_argument("--vocab-size", type=int, default=512, help="most tokens of the tokenizer")
    args = parser.parse_args(argv)
    splits = generate(args.train, args.validation, args.test, args.seed)
    tokenizer = write(args.out, splits, args.vocab_size)
    counts = ", ".join(f"{len(rows)} {split}" for split, rows in splits.items())
    print(f"{args.out}: {counts} rows; {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
