"""The questions of stock tasks in the model's own prompt format, graded by our own grader. No jax.

    "### User:\\n{question}\\n### Rationale:\\n" -> "{rationale}\\n### Answer:\\n{answer}"

Zero-shot, greedy, at most 512 new tokens, as the model was trained and as rounds sample. A task is
an ordinary task of lm-eval, with the data set of the stock one: limits, caching and standard errors
are lm-eval's. Metrics per question, as means:

    acc        the grader says "correct" (`rounds.grade`, `rounds.choices`)
    valid      the answer is well-formed: both sections, one header
    unknown    well-formed, but only a person could judge it; counts as wrong in acc

A model that was never trained in this format has no valid answers, so scores compare models of one
recipe with one another, never with few-shot scores of others. A completion that 512 tokens cut off
is graded as it stands: lm-eval hands over no reason why a text ended.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

from memphis_jax.data.prompts import STOP, cot_prompt
from memphis_jax.eval_tasks import SUFFIX, Stock
from memphis_jax.rounds.choices import check_choice, read_options
from memphis_jax.rounds.grade import grade
from memphis_jax.rounds.symbolic import SymbolicEqual

Row = dict[str, Any]
Question = tuple[str, str]  # (prompt, ground truth)

NEW_TOKENS = 512  # the card's


def gsm8k(doc: Row) -> Question:
    return doc["question"], doc["answer"].rpartition("####")[2].strip()


def agieval(doc: Row) -> Question:
    """The passage, the question and its options; the letter of the right one."""
    asked = doc["query"].rpartition("\nA: Among A through")[0]
    # Without a passage the question begins at once, and may itself contain the mark.
    passage, question = ("", asked[3:]) if asked.startswith("Q: ") else asked.rsplit("Q: ", 1)
    text, header, options = question.rpartition(" Answer Choices: ")
    prompt = f"{passage.strip()}\n\n{text}\n{header.strip()} {options}".strip()
    return prompt, "ABCDEFG"[doc["gold"][0]]


def bbh(doc: Row) -> Question:
    return doc["input"], doc["target"]


READERS: dict[str, Callable[[Row], Question]] = {
    "gsm8k": gsm8k,
    "agieval_": agieval,
    "bbh_cot_fewshot_": bbh,
}


class Asked(NamedTuple):
    """What is evaluated: lm-eval's tasks and groups by name, and what is known of each task."""

    tasks: dict[str, Any]
    groups: dict[str, Any]
    about: dict[str, Row]


def assemble(names: Sequence[str], stock: Stock) -> Asked:
    """The tasks and groups of these names: stock ones as they are, those with SUFFIX made here."""
    asked = Asked({}, {}, {})
    for name in names:
        base, ending = name.removesuffix(SUFFIX), SUFFIX if name.endswith(SUFFIX) else ""
        for leaf in stock.leaves[base]:
            task = stock.tasks[leaf]
            asked.tasks[leaf + ending] = make(leaf, task) if ending else task
            asked.about[leaf + ending] = stock.about[leaf]
        _add_group(base, ending, stock, asked)
    return asked


def _add_group(name: str, ending: str, stock: Stock, asked: Asked) -> Any:
    """The group with its members, themselves groups or tasks; a task's name gives the task."""
    from lm_eval.api.group import Group

    entry = stock.entries[name]
    if entry.kind.name != "GROUP":
        return asked.tasks.get(name + ending)  # None: a tag, which is no group
    config = {key: value for key, value in entry.cfg.items() if key != "include"}
    if ending:
        metric = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
        config = {"task": entry.cfg["task"], "aggregate_metric_list": [metric]}
    group = Group.from_config({**config, "group": name + ending})
    for member in entry.cfg["task"]:
        known = member if isinstance(member, str) else member.get("task", member.get("group"))
        group.add(_add_group(known, ending, stock, asked))
    asked.groups[name + ending] = group
    return group


def make(name: str, stock: Any) -> Any:
    """The task `name` of lm-eval in our format. Raises ValueError where it is of no known kind."""
    from lm_eval.api.task import ConfigurableTask

    read = next((reader for start, reader in READERS.items() if name.startswith(start)), None)
    if read is None:
        raise ValueError(
            f"--tasks {name}{SUFFIX}: only gsm8k, agieval_* and bbh_cot_fewshot_* have questions "
            "that are known to fit the format"
        )
    means = [
        {"metric": metric, "aggregation": "mean", "higher_is_better": metric != "unknown"}
        for metric in ("acc", "valid", "unknown")
    ]
    return ConfigurableTask(
        config={
            "task": name + SUFFIX,
            "custom_dataset": lambda **_: stock.dataset,
            "test_split": stock.config.test_split,
            "output_type": "generate_until",
            "doc_to_text": lambda doc: cot_prompt(read(doc)[0]),
            "doc_to_target": lambda doc: read(doc)[1],
            "process_results": partial(_metrics, read, name),
            "generation_kwargs": {
                "until": [STOP],
                "max_gen_toks": NEW_TOKENS,
                "do_sample": False,
                "temperature": 0.0,
            },
            "num_fewshot": 0,
            "metric_list": means,
            "metadata": {"version": 1.0},
        }
    )


def _metrics(read: Callable[[Row], Question], source: str, doc: Row, results: Sequence[str]) -> Row:
    prompt, target = read(doc)
    check = partial(check_choice, options=read_options(prompt), source=source, equal=_equal())
    verdict = grade(results[0], target, check=check, source=source).verdict
    return {
        "acc": float(verdict == "correct"),
        "valid": float(verdict != "invalid"),
        "unknown": float(verdict == "unknown"),
    }


@lru_cache(maxsize=1)
def _equal() -> SymbolicEqual:
    """One worker for all tasks; it starts with the first formula and ends with this process."""
    return SymbolicEqual()
