"""What the README says of the configs is what the configs hold."""

import re
from functools import reduce
from pathlib import Path

import pytest

from memphis_jax import config as configs

REPO = Path(__file__).parents[1]
CARD_ROW = re.compile(r"^\|[^|]*\| `([\w.]+)` \| (\S+) \|$", re.MULTILINE)


def test_the_card_table_is_the_config() -> None:
    config = configs.load(str(REPO / "configs" / "memphis_cot.py"))
    rows = CARD_ROW.findall((REPO / "README.md").read_text())
    assert len(rows) >= 25
    for field, shown in rows:
        assert str(reduce(getattr, field.split("."), config)) == shown, field


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_loads(path: Path) -> None:
    assert configs.load(str(path)).rounds.num_rounds == (0 if "scribe" in path.stem else 4)


def test_commands_named_in_the_readme_exist() -> None:
    from memphis_jax.__main__ import COMMANDS

    text = (REPO / "README.md").read_text()
    listed = re.search(r"each stage: (.*?)\.\n", text, re.DOTALL)
    assert listed is not None
    assert set(re.findall(r"`(\w+)`", listed[1])) | {"rounds"} == set(COMMANDS)


@pytest.mark.parametrize("command", ["rounds", "scribe", "data", "train", "plan"])
def test_help_says_where_the_config_fields_are(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from memphis_jax.__main__ import main

    with pytest.raises(SystemExit):
        main([command, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "memphis_jax/config.py lists all of them" in told
    assert (REPO / "memphis_jax" / "config.py").is_file()
