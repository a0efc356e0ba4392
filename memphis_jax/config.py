"""Everything a user can set, checked: ml_collections ConfigDict -> frozen dataclasses.

A config file in configs/ has `get_config() -> ConfigDict`; `load` turns it, with overrides from the
command line, into one `RunConfig`. Every check of a user's value lives here (of a model's shape:
`model_config.py`, of training: `training_config.py`); inner functions take plain values.
"""

import json
import re
import runpy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from memphis_jax.fields import (
    ConfigError,
    build,
    not_negative,
    one_of,
    positive,
    require,
    share,
    with_defaults,
)
from memphis_jax.model_config import ModelConfig
from memphis_jax.training_config import (  # noqa: F401  the program has them from here
    REMAT,
    ComputeConfig,
    MeshConfig,
    OptimizerConfig,
    PhaseConfig,
    check_context,
    check_mesh,
)


@dataclass(frozen=True)
class StartConfig:
    """Where the weights come from: an HF folder, or (empty) random weights of the shape `model`.

    `memphis scribe` needs trained ones. Without a folder it makes them by `memphis rounds` with
    another config, set as on the command line: ("--config.rounds.num_rounds=2",).
    """

    hf_folder: str = ""
    rounds_config: str = ""
    rounds_overrides: tuple[str, ...] = ()


# What a row of one's own must have, by template: column names are given for one of these sets.
COLUMNS = {
    "cot": ({"prompt", "rationale", "target"}, {"prompt", "rationale", "target", "source"}),
    "chat": ({"messages"}, {"user", "assistant"}),
}


@dataclass(frozen=True)
class MixtureEntry:
    """One data set of the mixture: a recipe by its name, or a data set of one's own (docs/data.md).

    A recipe knows its template, its columns and its filters, so an entry sets none of these.
    """

    rows: int = 0  # to take at most; 0 = the recipe's number, or all of a data set of one's own
    repo: str = ""  # hub: owner/name
    revision: str = ""  # hub: a commit; what the hub resolves it to is recorded
    path: str = ""  # or here: a file or a folder of Parquet, JSON Lines or CSV
    split: str = "train"
    template: str = ""  # one's own: "cot" or "chat"
    columns: dict[str, str] = field(default_factory=dict)  # one's own: what -> name of its column
    at_least: dict[str, float] = field(default_factory=dict)  # one's own: column -> lowest number

    def __post_init__(self) -> None:
        not_negative(self, "rows")
        require(bool(self.split), "split is empty: 'train' is usual")
        require(
            not (self.path and (self.repo or self.revision)),
            f"path = {self.path!r} is on this machine: leave out repo and revision, or the path",
        )
        one_of("template", self.template, ("", *COLUMNS))
        if self.template:
            require(bool(self.repo or self.path), "path and repo are empty: give one of them")
            require(
                set(self.columns) in COLUMNS[self.template],
                f"columns = {self.columns} is not {self.template!r}'s: give "
                + " or ".join(", ".join(sorted(names)) for names in COLUMNS[self.template]),
            )
        else:
            for name in ("columns", "at_least"):
                value = getattr(self, name)
                require(not value, f"{name} = {value} needs a template, 'cot' or 'chat'")


@dataclass(frozen=True)
class DataConfig:
    source: str = "procedural"  # (embedded default), "jsonl" (TinyCoT-shaped files) or "mixture"
    task: str = "sums"  # procedural: "sums" or "more", a second skill
    num_train: int = 0  # procedural: rows to make
    num_validation: int = 0  # mixture: CoT questions held out of training
    num_test: int = 0
    vocab_size: int = 512  # procedural: size of the tokenizer trained on the rows
    train: str = ""  # jsonl: files of {prompt, rationale, target, source}
    validation: str = ""
    test: str = ""
    tokenizer: str = ""  # not procedural: folder with tokenizer.json; "" = the start's
    mixture: dict[str, MixtureEntry] = field(default_factory=dict)  # name -> what to take of it
    root: str = ""  # mixture: folder of local copies, ROOT/OWNER/NAME or ROOT/NAME; "" = the hub
    evaluation: tuple[str, ...] = ()  # guarded sets: JSON Lines files, or names on the hub
    contamination: str = "drop"  # training rows that match an evaluation set: "drop" or "keep"

    def __post_init__(self) -> None:
        one_of("source", self.source, ("procedural", "jsonl", "mixture"))
        one_of("contamination", self.contamination, ("drop", "keep"))
        one_of("task", self.task, ("sums", "more"))
        if self.source == "procedural":
            positive(self, "num_train", "num_validation", "num_test", "vocab_size")
        elif self.source == "mixture":
            require(bool(self.mixture), "mixture is empty: name a data set (docs/data.md)")
            not_negative(self, "num_validation", "num_test")
            for name in ("train", "validation", "test"):
                value = getattr(self, name)
                require(not value, f"{name} = {value!r} is for source = 'jsonl', not 'mixture'")
        else:
            for name in ("train", "validation", "test"):
                require(bool(getattr(self, name)), f"{name} is empty: give a JSON Lines file")


@dataclass(frozen=True)
class GenerateConfig:
    engine: str = "jax"  # "jax": the embedded sampler; "vllm": from exported weights
    python: str = ".venv-vllm/bin/python"  # vllm: the interpreter that has it
    num_samples: int = 8  # answers per question
    temperature: float = 0.5  # 0 = greedy
    top_p: float = 0.8
    max_new_tokens: int = 512
    questions_per_round: int = 0  # 0 = all; otherwise another random share each round
    batch_questions: int = 64  # questions in a published block, what a killed sampler may lose
    batch_size: int = 64  # jax: sequences decoded at once
    data_parallel: int = 1  # vllm: processes, one shard of the questions each
    tensor_parallel_size: int = 1  # vllm: GPUs per process
    parity_completions: int = 64  # vllm: rescored with JAX after each generation; 0 = none
    parity_bound: float = 0.0  # nats per token; 0 = 0.02 in float32, 0.05 in bfloat16

    def __post_init__(self) -> None:
        one_of("engine", self.engine, ("jax", "vllm"))
        positive(self, "num_samples", "max_new_tokens", "batch_questions", "batch_size")
        positive(self, "data_parallel", "tensor_parallel_size")
        not_negative(self, "temperature", "questions_per_round")
        not_negative(self, "parity_completions", "parity_bound")
        require(0 < self.top_p <= 1, f"top_p = {self.top_p} must be in (0, 1]")


@dataclass(frozen=True)
class MergeConfig:
    """How two models become one: `memphis merge`, and `memphis scribe` with the start."""

    method: str = "slerp"  # or "linear"
    t: float = 0.5  # 0 = the first (the start), 1 = the second (finetuned)
    t_for: tuple[str, ...] = ()  # "REGEX=T": t of tensors whose name holds REGEX; the first counts
    threshold: float = 0.9995  # SLERP is linear where |cos| of the angle is above it; mergekit's
    sweep: tuple[float, ...] = ()  # scribe: t to score on held-out questions; () = none
    eval_tasks: str = ""  # scribe: for `memphis eval --tasks` too; "" = none
    eval_options: tuple[str, ...] = ()  # further words for it: ("--limit=100",)

    def __post_init__(self) -> None:
        one_of("method", self.method, ("slerp", "linear"))
        share(self, "t")
        require(
            0 < self.threshold <= 1, f"threshold = {self.threshold} must be in (0, 1]: it is |cos|"
        )
        for t in self.sweep:
            require(0 <= t <= 1, f"sweep: t = {t} must be between 0 and 1")
        self.patterns()

    def patterns(self) -> list[tuple[re.Pattern[str], float]]:
        """`t_for`, read."""
        found = []
        for text in self.t_for:
            regex, _, number = text.rpartition("=")
            try:
                pattern, t = re.compile(regex), float(number)
            except (re.error, ValueError) as error:
                raise ConfigError(
                    f"t_for: {text!r} is not REGEX=T, as mlp=0.3 is: {error}"
                ) from None
            require(bool(regex) and 0 <= t <= 1, f"t_for: {text!r} is not REGEX=T with T in 0..1")
            found.append((pattern, t))
        return found


@dataclass(frozen=True)
class RoundsConfig:
    num_rounds: int = 4
    max_pairs_per_question: int = 0  # 0 = no limit
    eval_samples: int = 4  # sampled answers per held-out question

    def __post_init__(self) -> None:
        not_negative(self, "num_rounds", "max_pairs_per_question")
        positive(self, "eval_samples")


@dataclass(frozen=True)
class ExecutorConfig:
    """Command prefix per kind of stage ("" = run here), split like a shell would, never by one."""

    train: str = ""
    generate: str = ""


@dataclass(frozen=True)
class RunConfig:
    sft: PhaseConfig
    rank: PhaseConfig
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    start: StartConfig = field(default_factory=StartConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        not_negative(self, "seed")
        require(self.seed < 2**32, f"seed = {self.seed} must be below 2^32")
        if self.data.source != "procedural" and not self.start.hf_folder:
            require(
                bool(self.data.tokenizer),
                "data.tokenizer is empty: random weights need a folder with tokenizer.json",
            )


def overrides_help(example: str) -> str:
    """What the help of a command says that takes `--config.a.b=value`."""
    return (
        f"Any config field can be set: --config.{example}; memphis_jax/*config.py list all of them "
        "with their defaults."
    )


def load(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """RunConfig of a configs/*.py (or a saved config.json) with `--config.a.b=value` overrides."""
    require(Path(path).is_file(), f"--config {path}: no such file")
    if path.endswith(".json"):
        require(not overrides, f"{path} is a saved config: it takes no overrides ({overrides})")
        try:
            saved = json.loads(Path(path).read_text())
        except ValueError as error:
            raise ConfigError(f"{path} is no JSON: {error}") from None
        return build(RunConfig, saved)
    from absl import flags
    from ml_collections import ConfigDict, config_flags

    module = runpy.run_path(path)
    require("get_config" in module, f"{path} has no function get_config()")
    fields = with_defaults(RunConfig, module["get_config"]().to_dict())
    values, words = flags.FlagValues(), ["memphis", *overrides]
    try:
        holder = config_flags.DEFINE_config_dict(
            "config", ConfigDict(fields), flag_values=values, sys_argv=words
        )
        surplus = values(words)[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        inner, told = next(iter(error.args), None), str(error)
        if isinstance(inner, KeyError):  # of ml_collections: 'x'\nDid you mean "y" instead of "x"?
            told = f"there is no field {inner.args[0]}".replace("\n", ". ")
        raise ConfigError(f"{' '.join(overrides)}: {told}") from None
    require(not surplus, f"unknown arguments: {' '.join(surplus)}")
    return build(RunConfig, holder.value.to_dict())
