"""What the README says of the configs is what the configs hold."""

import re
import subprocess
import sys
from functools import cache, reduce
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
    assert "memphis_jax/*config.py list all of them" in told
    assert (REPO / "memphis_jax" / "config.py").is_file()


# --- the commands that README and docs show

LINE = re.compile(
    r"^ {4,}(?:\S*bin/)?(memphis \w+|python -m convert [\w-]+|python -m benchmarks \w+|"
    r"\S*python -m memphis_jax\.rounds\.generate|launch/\w+\.sh)\b(.*)$",
    re.MULTILINE,
)


def shown_commands() -> list[tuple[str, str]]:
    """(command, the rest of its line) of every indented line that is one of ours."""
    found = []
    for path in (REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))):
        text = path.read_text().replace("\\\n", " ")
        found += [(match[1], match[2].partition(" #")[0]) for match in LINE.finditer(text)]
    return found


@cache
def help_of(command: str) -> str:
    words = command.split()
    if command.startswith("launch/"):
        run = [str(REPO / command)]
    elif command.startswith("memphis"):
        run = [sys.executable, "-m", "memphis_jax", *words[1:]]
    else:
        run = [sys.executable, *words[1:]]
    ended = subprocess.run([*run, "--help"], cwd=REPO, capture_output=True, text=True, check=True)
    return ended.stdout


@pytest.mark.slow
def test_every_option_that_the_docs_show_exists() -> None:
    shown = shown_commands()
    assert len(shown) >= 60 and len({command for command, _ in shown}) >= 20
    for command, rest in shown:
        words = re.findall(r"(?<![\w\"=])--[a-z][\w-]*(?![\w.-])", rest)
        own, _, inner = rest.partition(" -- ")  # a script's own options, then another command's
        for word in words:
            known = help_of(command)
            if command == "launch/recipe.sh":  # takes those of tpu_create.sh too
                known += help_of("launch/tpu_create.sh")
            if word not in re.findall(r"--[a-z][\w-]*", own):
                assert word in inner
                worker = re.search(r"-m memphis_jax(?:\.rounds\.generate| \w+)", inner)
                assert worker is not None, (command, rest)
                known = help_of(f"python {worker[0]}")
            assert word in re.findall(r"--[a-z][\w-]*", known), f"{command}: no option {word}"


def test_every_config_field_that_the_docs_name_exists() -> None:
    config = configs.load(str(REPO / "configs" / "memphis_cot.py"))
    texts = [path.read_text() for path in (REPO / "README.md", *(REPO / "docs").glob("*.md"))]
    sections = "sft|rank|data|model|start|compute|mesh|generate|rounds|merge|executor"
    named = re.compile(rf"--config\.([a-z_.]+)=|`((?:{sections})\.[a-z_.]+[a-z_])`(?!\))")
    fields = {match[1] or match[2] for text in texts for match in named.finditer(text)}
    assert len(fields) >= 40
    for field in fields:
        names = field.split(".")
        if names[:2] == ["data", "mixture"]:
            names = names[:2]
        assert reduce(getattr, names, config) is not None, field
