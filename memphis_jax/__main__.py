"""`memphis COMMAND`: dispatch with lazy imports, nothing else."""

import importlib
import sys
from collections.abc import Sequence

from memphis_jax import hosts
from memphis_jax.errors import one_line

COMMANDS = {  # name: (module, function, what it does)
    "rounds": ("rounds.run", "run", "the whole recipe: SFT, then rounds of sampling and ranking"),
    "data": ("data.prepare", "data", "the data files of a run"),
    "train": ("commands", "train", "one training phase, SFT or rank"),
    "sample": ("rounds.sample", "sample", "answers to questions, by the JAX sampler"),
    "parity": ("rounds.parity", "parity", "does the trainer agree with the sampler's logprobs?"),
    "grade": ("rounds.commands", "grade", "check answers against the ground truth"),
    "pairs": ("rounds.commands", "pairs", "correct-incorrect pairs of graded answers"),
    "merge": ("merge", "merge", "two HF folders of one model into one, by SLERP or linearly"),
    "scribe": ("rounds.scribe", "run", "finetune a CoT model further, merge it with its start"),
    "publish": ("publish", "publish", "model card, chat template and evals of a model; upload"),
    "accuracy": ("rounds.commands", "accuracy", "accuracies of graded held-out answers"),
    "plan": ("plan", "plan", "does a config fit a TPU slice, how fast, how long? needs no TPU"),
    "eval": ("evaluate", "evaluate", "benchmarks of an HF folder by lm-evaluation-harness"),
    "report": ("report", "main", "one HTML page about a run"),
}
ON_ALL_HOSTS = ("train", "parity")  # what several hosts compute together


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: memphis COMMAND [options]     (memphis COMMAND --help tells more)\n")
        for name, (_, _, about) in COMMANDS.items():
            print(f"  {name:10} {about}")
        print("\nCheckpoints from and to Hugging Face folders: python -m convert --help")
        return
    if argv[0] not in COMMANDS:
        sys.exit(f"memphis: no command {argv[0]!r}; there are {', '.join(COMMANDS)}")
    module, function, _ = COMMANDS[argv[0]]
    with one_line(f"memphis {argv[0]}"):
        group = hosts.from_environment() if argv[0] in ON_ALL_HOSTS else None
        if group and not hosts.is_guarded():
            sys.exit(hosts.guard(group, [sys.executable, "-m", "memphis_jax", *argv]))
        getattr(importlib.import_module(f"memphis_jax.{module}"), function)(argv[1:])


if __name__ == "__main__":
    main()
