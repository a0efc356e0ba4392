"""`memphis COMMAND`: dispatch with lazy imports, nothing else."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "rounds": ("memphis_jax.rounds.run", "run", "the whole recipe: SFT, then rounds of sampling and ranking"),
    "train": ("memphis_jax.commands", "train", "one training phase, SFT or rank"),
    "sample": ("memphis_jax.commands", "sample", "answers to questions, by the JAX sampler"),
    "grade": ("memphis_jax.rounds.commands", "grade", "check answers against the ground truth"),
    "pairs": ("memphis_jax.rounds.commands", "pairs", "correct-incorrect pairs from graded answers"),
    "accuracy": ("memphis_jax.rounds.commands", "accuracy", "accuracies of graded held-out answers"),
    "report": ("memphis_jax.report", "main", "one HTML page about a run"),
}


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
    try:
        getattr(importlib.import_module(module), function)(argv[1:])
    except (ValueError, RuntimeError, OSError) as error:
        if type(error).__module__.startswith("jax") or "--traceback" in argv:
            raise
        sys.exit(f"memphis {argv[0]}: {error}")


if __name__ == "__main__":
    main()
