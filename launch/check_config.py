"""Does a config fit a pod? launch/recipe.sh asks before it creates one. No jax.

python launch/check_config.py CONFIG DEVICES [--config.FIELD=VALUE ...]
"""

import json
import sys
from pathlib import Path

from memphis_jax import config as configs
from memphis_jax.errors import one_line


def check(path: str, devices: int, overrides: list[str]) -> None:
    """Raises ConfigError for what `memphis train` would refuse on so many devices."""
    config = configs.load(path, overrides)
    model = config.model
    if config.start.hf_folder:
        file = Path(config.start.hf_folder) / "config.json"
        if not file.is_file():
            raise configs.ConfigError(f"start.hf_folder: there is no {file}; name the base model")
        model = configs.ModelConfig.from_hf(json.loads(file.read_text()))
    configs.check_mesh(model, config.mesh.sizes(devices), {"sft": config.sft, "rank": config.rank})


if __name__ == "__main__":
    with one_line("recipe.sh"):
        check(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
