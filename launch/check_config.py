"""Does a config fit a pod? launch/recipe.sh asks before it creates one. No jax.

python launch/check_config.py CONFIG DEVICES [--config.FIELD=VALUE ...]
"""

import sys

from memphis_jax import config as configs
from memphis_jax.errors import one_line
from memphis_jax.rounds.run import start_model


def check(path: str, devices: int, overrides: list[str]) -> None:
    """Raises ConfigError for what `memphis train` would refuse on so many devices."""
    config = configs.load(path, overrides)
    phases = {"sft": config.sft, "rank": config.rank}
    configs.check_mesh(start_model(config), config.mesh.sizes(devices), phases)


if __name__ == "__main__":
    with one_line("recipe.sh"):
        check(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
