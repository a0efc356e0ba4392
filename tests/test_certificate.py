"""A model folder is taken with its certificate, or refused with every file named."""

import hashlib
import json
from pathlib import Path

import pytest

from memphis_jax.rounds.certificate import check_certificate, file_hashes

FILES = {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "[]"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    certificate = {"format": 1, "files": file_hashes(tmp_path), "source": {"step": 3}}
    (tmp_path / "conversion.json").write_text(json.dumps(certificate))
    return tmp_path


def check(folder: Path) -> None:
    check_certificate(folder, file_hashes(folder))


def refused(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        check(folder)
    told = str(caught.value)
    assert "--uncertified" in told and len(told.splitlines()) == 1
    return told


def test_the_folder_as_it_was_exported(folder: Path) -> None:
    check(folder)
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in FILES.items()}
    assert file_hashes(folder) == hashes


def test_no_certificate(folder: Path) -> None:
    (folder / "conversion.json").unlink()
    assert f"{folder} has no conversion.json" in refused(folder)


def test_everything_that_is_wrong_is_named(folder: Path) -> None:
    (folder / "model.safetensors").write_text("Weights")
    (folder / "tokenizer.json").unlink()
    (folder / "extra").mkdir()
    (folder / "extra" / "code.py").write_text("")
    told = refused(folder)
    assert f"{folder / 'conversion.json'} does not match its folder: " in told
    problems = told.split(": ", 1)[1].split("; ")[:-1]
    assert problems == [
        "extra/code.py is not in it",
        "model.safetensors is not what was certified",
        "tokenizer.json is missing",
    ]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"files": 3}', '{"files": ["a"]}', "\xff"]
)
def test_a_file_that_is_no_certificate(folder: Path, text: str) -> None:
    (folder / "conversion.json").write_bytes(text.encode("latin-1"))
    assert "conversion.json is not a certificate of to-hf" in refused(folder)


def test_an_empty_certificate_covers_nothing(folder: Path) -> None:
    (folder / "conversion.json").write_text('{"files": {}}')
    assert refused(folder).count("is not in it") == len(FILES)
