"""The real sets of ../shared/data in TinyCoT's shape: {prompt, rationale, target, source}.

TinyCoT itself could not be had: its card says what it is made of (strategyqa, TAL-SCQ5K, quartz,
GSM8K, FLUTE and MATH), but no row of it was seen. Of these, four are here; AQuA, ECQA and QASC
of FLAN come on top. How each becomes a row is our choice:

- GSM8K's calculator marks <<48/2=24>> are taken out: they are no human text, and no calculator
  reads them here. Whether TinyCoT keeps them is unknown. The target is what follows "####".
- StrategyQA's rationale is its facts; the target is yes or no.
- TAL-SCQ5K's options are listed under the question; the target is the letter.
- MATH's rationale is the solution, the target what stands in its last \\boxed{}.
- FLAN writes line ends as a literal \\n; prompt, target ("(C)", or an option's text) are its own.
"""

import json
import re
from pathlib import Path

from memphis_jax.rounds.files import read_jsonl

Row = dict[str, str]

_CALCULATOR = re.compile(r"<<[^<>]*>>")


def read_all(data: Path) -> list[Row]:
    """All rows of all sets, in a fixed order; none is left out."""
    rows = _gsm8k(data) + _strategyqa(data) + _tal_scq5k(data) + _math(data)
    for name in ("aqua", "ecqa", "strategyqa", "qasc"):
        rows += _flan(data, name)
    return rows


def _row(prompt: str, rationale: str, target: str, source: str) -> Row:
    return {"prompt": prompt, "rationale": rationale, "target": target, "source": source}


def _gsm8k(data: Path) -> list[Row]:
    rows = []
    for row in read_jsonl(data / "gsm8k/train.jsonl"):
        rationale, target = _CALCULATOR.sub("", row["answer"]).split("\n#### ")
        rows.append(_row(row["question"], rationale, target, "gsm8k"))
    return rows


def _strategyqa(data: Path) -> list[Row]:
    return [
        _row(
            row["question"], " ".join(row["facts"]), "yes" if row["answer"] else "no", "strategyqa"
        )
        for row in json.loads((data / "strategyqa/dev.json").read_text("utf-8"))
    ]


def _tal_scq5k(data: Path) -> list[Row]:
    rows = []
    for row in read_jsonl(data / "tal_scq5k/en_single_choice_train.first1000.jsonl"):
        options = [part for option in row["answer_option_list"] for part in option]
        lines = [f"({part['aoVal']}) {part['content'].strip()}" for part in options]
        prompt = "\n".join([row["problem"].strip(), *lines])
        rows.append(
            _row(prompt, "\n".join(row["answer_analysis"]), row["answer_value"], "tal_scq5k")
        )
    return rows


def _math(data: Path) -> list[Row]:
    rows = []
    for path in sorted((data / "math").rglob("*.json")):
        row = json.loads(path.read_text("utf-8"))
        rows.append(_row(row["problem"], row["solution"], last_boxed(row["solution"]), "math"))
    return rows


def last_boxed(solution: str) -> str:
    """What stands in the last \\boxed{...} of a MATH solution. ValueError where there is none."""
    start = solution.rindex("\\boxed{") + len("\\boxed{")
    depth = 1
    for at in range(start, len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[at], 0)
        if depth == 0:
            return solution[start:at]
    raise ValueError(f"\\boxed is never closed: {solution!r}")


def _flan(data: Path, name: str) -> list[Row]:
    rows = []
    for line in (data / f"flan_cot/{name}_train.tsv").read_text("utf-8").split("\n")[:-1]:
        question, answer, rationale = (text.replace("\\n", "\n") for text in line.split("\t"))
        rows.append(_row(question, rationale, answer, f"flan_{name}"))
    return rows
