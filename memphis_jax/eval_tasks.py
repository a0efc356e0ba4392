"""The tasks of `memphis eval`: presets, and local files in place of the hub's data sets. No jax.

lm-eval's own task files are used unchanged. With a data root, each task gets a small file beside
the results that includes the stock one and names local data instead; nothing else differs. What
cannot be had is said for all tasks at once, before a model is loaded.

    ROOT/gsm8k/{train,test}.jsonl       openai/grade-school-math: grade_school_math/data
    ROOT/agieval_v1_en/NAME.jsonl       ruixiangcui/AGIEval: data/v1
    ROOT/bbh/tasks/NAME.json            suzgunmirac/BIG-Bench-Hard: bbh
    ROOT/OWNER/NAME/...                 a copy of any data set of the hub
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from memphis_jax.rounds.files import read_jsonl, sha256_file, write_json, write_jsonl

Row = dict[str, Any]

CARD_TASKS = ("gsm8k", "agieval_nous", "bbh_cot_fewshot")
SUFFIX = "_memphis"  # of a task in the model's own prompt format
PRESETS = {
    "memphis": CARD_TASKS,
    "memphis-format": tuple(f"{name}{SUFFIX}" for name in CARD_TASKS),
}
FAMILIES = ("gsm8k", "agieval", "bbh/cot_fewshot")  # folders of lm-eval's tasks read at first
GSM8K_TEST = 1319  # rows of GSM8K's real test split


class Data(NamedTuple):
    """Local data in the place of a data set of the hub."""

    splits: dict[str, list[Row]]  # rows as the hub has them; {} where `folder` holds its files
    files: list[Path]  # what they were read from
    note: str = ""  # how they differ from the hub's
    folder: Path | None = None


class Stock(NamedTuple):
    """lm-eval's own tasks with their data, and what is known of each."""

    tasks: dict[str, Any]
    leaves: dict[str, list[str]]  # name asked for, without SUFFIX -> its tasks
    about: dict[str, Row]  # task -> {"definition_sha256", "data", "note", "files"}
    entries: dict[str, Any]  # lm-eval's index of names


def load(names: Sequence[str], root: Path | None, out: Path) -> Stock:
    """The stock tasks behind these names (tasks, groups, tags; presets already taken apart).

    With `root` their data is read from there alone, and what is written for it goes to OUT/tasks.
    Raises ValueError naming every unknown task, or every task without data, and the fix.
    """
    stock = [name.removesuffix(SUFFIX) for name in names]
    index = _index(stock, names)
    leaves = {name: list(_leaves(name, index)) for name in stock}
    every = list(dict.fromkeys(leaf for found in leaves.values() for leaf in found))
    configs = {leaf: _config(index, leaf) for leaf in every}
    about = {leaf: {"definition_sha256": _sha256(configs[leaf])} for leaf in every}
    local, missing = {}, {}
    for leaf, config in configs.items():
        if not root:
            break
        try:
            local[leaf] = local_data(root, config["dataset_path"], config.get("dataset_name"))
        except (OSError, ValueError, KeyError) as error:
            missing[leaf] = str(error)
    if missing:
        raise ValueError(_without_data(missing, names, leaves, root))
    for leaf in every:
        about[leaf] |= _origin(configs[leaf], local.get(leaf))
    manager = _manager(_overrides(out / "tasks", index, local))
    built, missing = _build(manager, every)
    if missing:
        raise ValueError(_without_data(missing, names, leaves, root))
    return Stock(built, leaves, about, index)


def _index(stock: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """lm-eval's index of tasks: of the presets' families, or of all where that is not enough."""
    index = _manager(None).task_index
    if not set(stock) <= index.keys():  # 15,000 tasks: half a minute
        from lm_eval.tasks import TaskManager

        index = TaskManager().task_index
    unknown = [name for name, base in zip(names, stock, strict=True) if base not in index]
    if unknown:
        raise ValueError(
            f"--tasks: lm-eval has no {', '.join(unknown)}; the presets are "
            f"{', '.join(PRESETS)}, and `lm-eval ls tasks` lists the others"
        )
    return index


def _manager(overrides: Path | None) -> Any:
    import lm_eval.tasks

    # It warns of every task that is put in the place of another, which is what is wanted here.
    logging.getLogger("lm_eval.tasks._index").setLevel(logging.ERROR)
    home = Path(lm_eval.tasks.__file__).parent
    paths = [*(home / family for family in FAMILIES), *([overrides] if overrides else [])]
    return lm_eval.tasks.TaskManager(include_path=paths, include_defaults=False)


def _leaves(name: str, index: dict[str, Any]) -> Iterator[str]:
    """The tasks of a task, group or tag."""
    entry = index[name]
    if entry.kind.name == "TAG":
        members: list[Any] = sorted(entry.tags)
    elif entry.kind.name == "GROUP":
        members = entry.cfg["task"]
    else:
        yield name
        return
    for member in members:
        known = member if isinstance(member, str) else member.get("task", member.get("group"))
        if known not in index:
            raise ValueError(f"--tasks {name}: its member {known!r} stands in no file of its own")
        yield from _leaves(known, index)


def _config(index: dict[str, Any], leaf: str) -> Row:
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(index[leaf].yaml_path, resolve_func=False)


def _sha256(config: Row) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def _origin(config: Row, data: Data | None) -> Row:
    hub = "/".join(filter(None, (config.get("dataset_path"), config.get("dataset_name"))))
    if data is None:
        return {"data": f"{hub} (hub)", "note": "", "files": {}}
    files = {str(path): sha256_file(path) for path in data.files}
    return {"data": f"local, for {hub}", "note": data.note, "files": files}


def local_data(root: Path, dataset: str, name: str | None) -> Data:
    """The rows of a hub's data set from the files below `root`, as the hub has them.

    Raises FileNotFoundError naming what was looked for, ValueError for a broken file.
    """
    if (root / dataset).is_dir():
        folder = (root / dataset).resolve()
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return Data({}, files, folder=folder)
    if dataset in ("openai/gsm8k", "gsm8k"):
        return _gsm8k(root, dataset)
    if dataset.startswith("hails/agieval-"):
        path = root / "agieval_v1_en" / f"{dataset.removeprefix('hails/agieval-')}.jsonl"
        rows = read_jsonl(_found(path, root, dataset))
        return Data({"test": [_agieval(row) for row in rows]}, [path])
    if dataset == "SaylorTwift/bbh":
        path = root / "bbh" / "tasks" / f"{name}.json"
        examples = json.loads(_found(path, root, dataset).read_text("utf-8"))["examples"]
        return Data({"test": examples}, [path])
    raise FileNotFoundError(f"{root / dataset}/ is missing")


def _found(path: Path, root: Path, dataset: str) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} or {root / dataset}/ is missing")
    return path


def _gsm8k(root: Path, dataset: str) -> Data:
    """Without a test split, the first training questions are the test; examples are the others."""
    train, test = (root / "gsm8k" / f"{split}.jsonl" for split in ("train", "test"))
    rows = read_jsonl(_found(train, root, dataset))
    if test.is_file():
        return Data({"train": rows, "test": read_jsonl(test)}, [train, test])
    number = min(GSM8K_TEST, len(rows) // 2)
    note = (
        f"TRAINING questions 1 to {number} stand in for the test questions, which are not there; "
        "few-shot examples come from the others. Not comparable with scores on the test split"
    )
    return Data({"train": rows[number:], "test": rows[:number]}, [train], note)


def _agieval(row: Row) -> Row:
    """{query, choices, gold} of hails/agieval-* from a row of AGIEval's own files.

    The query is AGIEval's zero-shot prompt (`convert_zero_shot` in src/dataset_loader.py). Of
    sat-math and aqua-rat, the result has to the byte the size that the hub states.
    """
    letters, options = "ABCDEFG", row["options"]
    query = (
        f"{row['passage'] or ''}Q: {row['question']} Answer Choices: {' '.join(options)}\n"
        f"A: Among A through {letters[len(options) - 1]}, the answer is"
    )
    return {"query": query, "choices": options, "gold": [letters.index(row["label"])]}


def _overrides(folder: Path, index: dict[str, Any], local: dict[str, Data]) -> Path | None:
    """Writes the data of each task as JSON Lines, and a task file that names it."""
    if not local:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    for leaf, data in local.items():
        change: Row = {"dataset_path": str(data.folder)}
        if not data.folder:
            names = {split: folder / f"{leaf}.{split}.jsonl" for split in data.splits}
            for split, rows in data.splits.items():
                write_jsonl(names[split], rows)
            change = {
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {
                    "data_files": {split: str(path.resolve()) for split, path in names.items()},
                    "cache_dir": str((folder / "arrow").resolve()),
                },
            }
        # JSON is YAML.
        stock = str(index[leaf].yaml_path)
        write_json(folder / f"{leaf}.yaml", {"include": stock, "task": leaf, **change})
    return folder


def _build(manager: Any, leaves: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """(tasks, why a task's data cannot be read). The hub is asked once where it is out of reach."""
    built: dict[str, Any] = {}
    missing: dict[str, str] = {}
    reach = True
    for leaf in leaves:
        try:
            built |= manager.load([leaf])["tasks"]
        except (OSError, ValueError) as error:
            missing[leaf] = f"{' '.join(str(error).split())[:200]}"
            if reach and isinstance(error, ConnectionError):
                reach = False
                _go_offline()
    return built, missing


def _go_offline() -> None:
    """What is in the cache can still be read; each further set would cost half a minute."""
    import datasets
    import huggingface_hub.constants

    datasets.config.HF_HUB_OFFLINE = True
    huggingface_hub.constants.HF_HUB_OFFLINE = True


def _without_data(
    missing: dict[str, str], names: Sequence[str], leaves: dict[str, list[str]], root: Path | None
) -> str:
    """All tasks that lack their data, what each needs, and how to go on."""
    rest = [
        leaf + (SUFFIX if name.endswith(SUFFIX) else "")
        for name in names
        for leaf in leaves[name.removesuffix(SUFFIX)]
        if leaf not in missing
    ]
    total = sum(len(leaves[name.removesuffix(SUFFIX)]) for name in names)
    needs = "".join(f"\n  {leaf}: {why}" for leaf, why in missing.items())
    fix = (
        "put the files there (a folder: a copy of the hub's data set), or leave out --data-root to "
        "read from the hub"
        if root
        else "connect to the hub, or give local files with --data-root"
    )
    others = f"; or evaluate what is there: --tasks {','.join(rest)}" if rest else ""
    return f"{len(missing)} of {total} tasks have no data:{needs}\n{fix}{others}"
