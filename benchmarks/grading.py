"""The grader on real answers: each gold answer against itself and against others' gold answers.

    python -m benchmarks grading --data FOLDER      FOLDER: gsm8k/, strategyqa/, math/, ...

Reads data sets that are ingredients of TinyCoT (and more of the kind) in their published form,
brings them into TinyCoT's {prompt, rationale, target, source} and prints a table by source.
"""

import argparse
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from memphis_jax.rounds.answers import Equal
from memphis_jax.rounds.choices import check_choice, read_options
from memphis_jax.rounds.grade import grade
from memphis_jax.rounds.symbolic import SymbolicEqual

Row = dict[str, str]

NUM_OTHERS = 4  # other questions' gold answers tried on each question


def read_sets(folder: Path) -> list[Row]:
    """Every row of the real sets below `folder`, as {prompt, rationale, target, source}."""
    readers = (_gsm8k, _strategyqa, _tal, _math, _aqua, _flan)
    return [row for reader in readers for row in reader(folder)]


def _row(prompt: str, rationale: str, target: str, source: str) -> Row:
    return {"prompt": prompt, "rationale": rationale, "target": target, "source": source}


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]


def _with_options(question: str, options: Sequence[tuple[str, str]]) -> str:
    return f"{question}\nAnswer Choices: " + " ".join(f"({x}) {text}" for x, text in options)


def _gsm8k(folder: Path) -> Iterator[Row]:
    for row in _lines(folder / "gsm8k/train.jsonl"):
        rationale, target = re.sub(r"<<.*?>>", "", row["answer"]).split("####")
        yield _row(row["question"], rationale.strip(), target.strip(), "gsm8k")


def _strategyqa(folder: Path) -> Iterator[Row]:
    for row in json.loads((folder / "strategyqa/dev.json").read_text("utf-8")):
        target = "yes" if row["answer"] else "no"
        yield _row(row["question"], " ".join(row["facts"]), target, "strategyqa")


def _tal(folder: Path) -> Iterator[Row]:
    for path in sorted((folder / "tal_scq5k").glob("*.jsonl")):
        for row in _lines(path):
            options = [(o[0]["aoVal"], o[0]["content"].strip()) for o in row["answer_option_list"]]
            prompt = _with_options(row["problem"].strip(), options)
            yield _row(prompt, row["answer_analysis"][0], row["answer_value"], "tal-scq5k")


def _math(folder: Path) -> Iterator[Row]:
    for path in sorted((folder / "math").glob("*/*/*.json")):
        row = json.loads(path.read_text("utf-8"))
        yield _row(row["problem"], row["solution"], _boxed(row["solution"]), "competition_math")


def _boxed(solution: str) -> str:
    """What the last \\boxed{...} holds."""
    start = solution.rindex("\\boxed{") + len("\\boxed{")
    depth, end = 1, start
    while depth:
        depth += {"{": 1, "}": -1}.get(solution[end], 0)
        end += 1
    return solution[start : end - 1]


def _aqua(folder: Path) -> Iterator[Row]:
    for split in ("dev", "test"):
        for row in _lines(folder / f"aqua/{split}.json"):
            options = [(option[0], option[2:].strip()) for option in row["options"]]
            prompt = _with_options(row["question"], options)
            yield _row(prompt, row["rationale"], row["correct"], f"aqua {split}")


def _flan(folder: Path) -> Iterator[Row]:
    for name in ("aqua", "ecqa", "qasc", "strategyqa"):
        text = (folder / f"flan_cot/{name}_train.tsv").read_text("utf-8")
        for line in filter(None, text.split("\n")):
            prompt, target, rationale = (x.replace("\\n", "\n") for x in line.split("\t"))
            yield _row(prompt, rationale, target, f"flan {name}")


class Found(NamedTuple):
    """Verdict counts of one source, by what was answered, and the answers to look at."""

    questions: Counter[str]
    counts: dict[str, dict[str, Counter[str]]]  # source -> form of answer -> verdict -> answers
    misjudged: list[tuple[str, str, Row]]  # (form, answer, question)
    respelled: set[tuple[str, str, str]]  # (source, another's gold answer, the one it equals)


def judge(rows: Sequence[Row], equal: Equal, seed: int = 0) -> Found:
    """Grade several forms of each gold answer, and others' gold answers.

    The gold answer as it is, in a sentence, its option by text and by letter with text (each must
    be correct), and NUM_OTHERS gold answers of the same source (correct only where `equal_golds`).
    """
    by_source: dict[str, list[Row]] = {}
    for row in rows:
        by_source.setdefault(row["source"], []).append(row)
    chosen = random.Random(seed)
    found = Found(Counter(row["source"] for row in rows), {}, [], set())
    for row in rows:
        options = read_options(row["prompt"])
        check = partial(check_choice, options=options, source=row["source"], equal=equal)
        forms = [(form, answer, True) for form, answer in _forms(row, options)]
        others = chosen.choices(by_source[row["source"]], k=NUM_OTHERS)
        forms += [("another's", o["target"], equal_golds(row, o["target"])) for o in others]
        for form, answer, right in forms:
            text = f"{row['rationale'].strip()}\n### Answer:\n{answer}"
            verdict = grade(text, row["target"], source=row["source"], check=check).verdict
            name = f"{form}, equal" if form == "another's" and right else form
            by_form = found.counts.setdefault(row["source"], {})
            by_form.setdefault(name, Counter())[verdict] += 1
            if form == "another's" and verdict == "correct" and answer != row["target"]:
                found.respelled.add((row["source"], answer, row["target"]))
            if right != (verdict == "correct"):
                found.misjudged.append((f"{name}: {verdict}", answer, row))
    return found


def _forms(row: Row, options: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """(form, answer) of right answers to a question."""
    yield "itself", row["target"]
    yield "in a sentence", f"The answer is {row['target']}."
    letter = row["target"].strip("()")
    for label, text in options:
        if label and label == letter:
            yield "option's text", text
            yield "letter and text", f"{label}) {text}"
            yield "bare letter", label


def equal_golds(row: Row, other: str) -> bool:
    """Whether two gold answers of one source are the same, by plain means of this file's own."""
    a, b = (re.sub(r"[\s(),$]", "", text).casefold() for text in (row["target"], other))
    try:
        return a == b or Fraction(a) == Fraction(b)
    except (ValueError, ZeroDivisionError):
        return a == b


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks grading", description=__doc__)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--list", type=int, default=20, help="how many misjudged answers to show")
    args = parser.parse_args(argv)
    rows = read_sets(args.data)
    start = time.perf_counter()
    with SymbolicEqual() as equal:
        found = judge(rows, equal)
    seconds = time.perf_counter() - start
    console = Console(width=150 if not sys.stdout.isatty() else None)
    table = Table("source", "questions", "answered by", "correct", "incorrect", "unknown")
    for source, by_form in found.counts.items():
        for form, verdicts in by_form.items():
            cells = [f"{verdicts[v]:,}" for v in ("correct", "incorrect", "unknown")]
            table.add_row(source, f"{found.questions[source]:,}", form, *cells)
    console.print(table)
    for form, answer, row in found.misjudged[: args.list]:
        print(f"{row['source']}: {form}: {answer!r} to {row['target']!r}: {row['prompt'][-200:]!r}")
    print(f"others' gold answers, correct but written otherwise: {sorted(found.respelled)}")
    gradings = sum(v.total() for by_form in found.counts.values() for v in by_form.values())
    print(
        f"{len(found.misjudged)} answers not as expected; {equal.timeouts} time-outs; {gradings:,} "
        f"gradings in {seconds:.1f} s, {1e5 * seconds / gradings:.1f} s per 100,000"
    )


if __name__ == "__main__":
    main()
