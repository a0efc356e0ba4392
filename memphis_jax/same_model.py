"""Are two HF folders of one model? Everything in which they are not, named at once. No jax."""

import dataclasses
from pathlib import Path

from memphis_jax import config as configs
from memphis_jax.fields import difference
from memphis_jax.rounds.files import read_object
from memphis_jax.tensors import DTYPES, IGNORED, Tensor, open_tensors

Tensors = dict[str, Tensor]


def same_model(a: Path, b: Path) -> tuple[Tensors, Tensors]:
    """The tensors of both, by name. Raises ValueError with every difference in one line."""
    left, right = (
        {name: tensor for name, tensor in open_tensors(x).items() if not IGNORED.fullmatch(name)}
        for x in (a, b)
    )
    if problems := mismatches(a, b, left, right):
        raise ValueError(f"{a} and {b} are not of one model: {'; '.join(problems)}")
    return left, right


def model_config(folder: Path) -> configs.ModelConfig:
    """The model that the folder's config.json describes, new or old spelling."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no model folder: it has no config.json")
    values = read_object(path)
    try:
        return configs.ModelConfig.from_hf(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def mismatches(a: Path, b: Path, left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    """Everything in which two folders are not of one model, a line each."""
    ours, theirs = (dataclasses.asdict(model_config(folder)) for folder in (a, b))
    for values in (ours, theirs):
        del values["initializer_range"]  # of no effect on a trained model
    lines = [f"config {line}" for line in difference(ours, theirs)]
    lines += _tokenizer_mismatches(a, b)
    lines += [f"{name} is only in {a}" for name in left if name not in right]
    lines += [f"{name} is only in {b}" for name in right if name not in left]
    for name in (name for name in left if name in right):
        x, y = left[name], right[name]
        if x.shape != y.shape:
            lines.append(f"{name}: shape {list(x.shape)} and {list(y.shape)}")
        if x.dtype != y.dtype:
            lines.append(f"{name}: dtype {x.dtype} and {y.dtype}")
        elif x.dtype not in DTYPES:
            lines.append(f"{name}: dtype {x.dtype} is not one of {', '.join(DTYPES)}")
    return lines


def _tokenizer_mismatches(a: Path, b: Path) -> list[str]:
    paths = [folder / "tokenizer.json" for folder in (a, b)]
    there = [path.is_file() for path in paths]
    if there != [True, True]:
        return ["tokenizer.json is only in one of them"] if any(there) else []
    left, right = map(read_object, paths)
    lines = []
    models = [model for one in (left, right) if isinstance(model := one.get("model"), dict)]
    vocabularies = [v for model in models if isinstance(v := model.get("vocab"), dict)]
    if len(vocabularies) == 2 and vocabularies[0] != vocabularies[1]:
        count = len({*vocabularies[0].items()} ^ {*vocabularies[1].items()})
        lines.append(f"the tokenizers' vocabularies differ in {count} entries")
    states = ("version", "truncation", "padding")
    parts = sorted((left.keys() | right.keys()) - {*states})
    differing = [part for part in parts if left.get(part) != right.get(part)]
    if differing and not lines:
        lines.append(f"the tokenizers differ in {', '.join(differing)}")
    return lines
