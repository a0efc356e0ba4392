"""The whole recipe, run for real: `memphis rounds` on small models, killed and carried on."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from memphis_jax import config as configs
from memphis_jax.rounds import commands
from memphis_jax.rounds.files import read_jsonl, write_json, write_jsonl
from memphis_jax.rounds.run import check, claim, start_model
from memphis_jax.rounds.run import run as rounds_run

REPO = Path(__file__).parents[1]
MEMPHIS = [sys.executable, "-m", "memphis_jax"]
TINY = ["rounds", "--config", str(REPO / "configs" / "tiny.py")]
SMALL = [  # a few seconds of each stage
    "--config.model.hidden_size=32",
    "--config.model.intermediate_size=64",
    "--config.model.num_hidden_layers=2",
    "--config.data.num_train=1200",
    "--config.data.num_validation=12",
    "--config.data.num_test=12",
    "--config.sft.epochs=3",
    "--config.sft.checkpoint_every=100",
    "--config.generate.questions_per_round=40",
    "--config.generate.num_samples=4",
    "--config.rounds.num_rounds=2",
    "--config.rounds.eval_samples=2",
]
# Numbers that a clock writes; everything else must be equal to the bit.
CLOCK = ("seconds",)


def start(workdir: Path, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [*MEMPHIS, *TINY, *options, "--workdir", str(workdir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=workdir.parent,
    )


def finish(workdir: Path, *options: str) -> str:
    process = start(workdir, *options)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def results(workdir: Path) -> dict[str, Any]:
    found = json.loads((workdir / "results.json").read_text())
    return {name: value for name, value in found.items() if name not in CLOCK}


def weights(workdir: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(workdir)): path.read_bytes()
        for path in sorted(workdir.rglob("*.safetensors"))
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("rounds") / "undisturbed"
    output = finish(workdir, *SMALL)
    assert str(workdir / "report.html") in output
    return workdir


@pytest.mark.slow
def test_a_run_ends_with_results_report_and_a_record_of_every_stage(undisturbed: Path) -> None:
    found = results(undisturbed)
    assert len(found["rounds"]) == 2
    for row in [found["sft"], *found["rounds"]]:
        assert {"test_greedy", "test_sampled", "valid_share"} <= row.keys()
        assert row["test_questions"] == 12
    assert "</html>" in (undisturbed / "report.html").read_text()
    records = {path.stem for path in (undisturbed / "ledger").iterdir()}
    for stage in ("generate", "grade", "pairs", "rank", "export"):
        assert f"round2-{stage}" in records
    assert read_jsonl(undisturbed / "round2" / "pairs.jsonl")  # so the rank phase was real
    completions = read_jsonl(undisturbed / "round1" / "generate" / "completions.jsonl")
    assert completions[0]["meta"]["num_samples"] == 4
    assert len(completions) == 1 + 40 * 4


@pytest.mark.slow
def test_killed_at_three_moments_and_started_again_gives_the_same_bits(
    undisturbed: Path, tmp_path: Path
) -> None:
    workdir, moments = tmp_path / "killed", random.Random(7)
    for _ in range(3):
        process = start(workdir, *SMALL)
        time.sleep(moments.uniform(4.0, 14.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(workdir, *SMALL)
    assert results(workdir) == results(undisturbed)
    assert weights(workdir) == weights(undisturbed)


@pytest.mark.slow
def test_a_finished_run_started_again_repeats_no_stage(undisturbed: Path) -> None:
    before = {path: path.read_bytes() for path in (undisturbed / "ledger").iterdir()}
    finish(undisturbed, *SMALL)
    assert {path: path.read_bytes() for path in (undisturbed / "ledger").iterdir()} == before


@pytest.mark.slow
def test_another_config_is_refused_and_the_differences_are_listed(undisturbed: Path) -> None:
    process = start(undisturbed, *SMALL, "--config.rank.rank_weight=2.0")
    output, _ = process.communicate()
    assert process.returncode != 0
    assert "rank.rank_weight: 5.0 -> 2.0" in output and "Traceback" not in output


@pytest.mark.slow
def test_gsm8k_with_the_real_tokenizer_goes_through_every_stage(
    shared: Path, tmp_path: Path
) -> None:
    """200 real questions, a random model: no correct answer, so the path without pairs is real."""
    rows = []
    for number, row in enumerate(read_jsonl(shared / "data" / "gsm8k" / "train.jsonl")[:220]):
        rationale, target = row["answer"].split("####")
        rows.append(
            {
                "id": str(number),
                "prompt": row["question"],
                "rationale": rationale.strip(),
                "target": target.strip(),
                "source": "gsm8k",
            }
        )
    for split, part in (("train", rows[:200]), ("validation", rows[200:210]), ("test", rows[210:])):
        write_jsonl(tmp_path / f"{split}.jsonl", part)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    stablelm = shared / "data" / "stablelm"
    shutil.copy(stablelm / "20B_tokenizer.json", tokenizer / "tokenizer.json")
    shutil.copy(stablelm / "special_tokens_map.json", tokenizer)
    output = finish(
        tmp_path / "run",
        "--config.data.source=jsonl",
        *(f"--config.data.{s}={tmp_path / s}.jsonl" for s in ("train", "validation", "test")),
        f"--config.data.tokenizer={tokenizer}",
        "--config.model.vocab_size=50304",
        "--config.model.hidden_size=32",
        "--config.model.intermediate_size=64",
        "--config.model.max_position_embeddings=512",
        "--config.sft.seq_len=512",
        "--config.rank.seq_len=512",
        "--config.sft.epochs=1",
        "--config.generate.questions_per_round=0",
        "--config.generate.num_samples=2",
        "--config.generate.max_new_tokens=16",
        "--config.rounds.num_rounds=1",
        "--config.rounds.eval_samples=1",
    )
    run = tmp_path / "run"
    assert "round 1: no question has both a correct and an incorrect answer" in output
    assert not read_jsonl(run / "round1" / "pairs.jsonl")
    assert len(read_jsonl(run / "round1" / "generate" / "completions.jsonl")) == 1 + 200 * 2
    note = json.loads((run / "ledger" / "round1-rank.json").read_text())["note"]
    assert "nothing to rank" in note
    assert results(run)["rounds"][0] == results(run)["sft"]


def test_a_config_is_the_same_when_it_comes_back_from_its_file(tmp_path: Path) -> None:
    """Tuples too: else no stopped run could go on."""
    config = configs.load(str(REPO / "configs" / "tiny.py"))
    claim(tmp_path, dataclasses.replace(config, seed=4))  # nothing is done yet: it may change
    claim(tmp_path, config)
    (tmp_path / "ledger").mkdir()
    write_json(tmp_path / "ledger" / "data.json", {"outputs": {"data": "0"}})
    claim(tmp_path, config)
    with pytest.raises(configs.ConfigError, match="seed: 0 -> 5"):
        claim(tmp_path, dataclasses.replace(config, seed=5))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"executor": configs.ExecutorConfig(train="nosuch --")}, "no command 'nosuch'"),
        ({"executor": configs.ExecutorConfig(generate="ssh 'a")}, "No closing quotation"),
    ],
)
def test_what_would_fail_after_hours_is_said_at_once(changes: dict[str, Any], told: str) -> None:
    config = configs.load(str(REPO / "configs" / "tiny.py"))
    with pytest.raises(configs.ConfigError, match=told):
        check(dataclasses.replace(config, **changes), config.model)


def test_rows_longer_than_the_start_models_context_are_refused(tmp_path: Path) -> None:
    """The HF folder's context counts, not that of `config.model`, which nothing reads then."""
    config = configs.load(str(REPO / "configs" / "tiny.py"))
    start = dataclasses.replace(config.start, hf_folder=str(tmp_path))
    config = dataclasses.replace(config, start=start)
    with pytest.raises(configs.ConfigError, match=r"there is no .*config\.json"):
        start_model(config)
    short = dataclasses.replace(config.model, max_position_embeddings=config.sft.seq_len - 1)
    write_json(tmp_path / "config.json", short.to_hf())
    with pytest.raises(configs.ConfigError, match=r"sft\.seq_len = .* exceeds the model's"):
        check(config, start_model(config))


def test_the_other_recipes_config_is_refused(tmp_path: Path) -> None:
    words = ["--config", str(REPO / "configs" / "tiny_scribe.py"), "--workdir", str(tmp_path)]
    with pytest.raises(configs.ConfigError, match="`memphis scribe` reads it"):
        rounds_run(words)


def graded_file(path: Path, rows: list[dict[str, Any]], num_samples: int, *skipped: str) -> Path:
    meta = {"num_samples": num_samples, "skipped": dict.fromkeys(skipped, "too long")}
    write_jsonl(path, [{"meta": meta}, *rows])
    return path


def accuracies(folder: Path, greedy: Path, sampled: Path) -> dict[str, float]:
    commands.accuracy(
        [
            *("--greedy", str(greedy), "--sampled", str(sampled)),
            *("--validation", str(folder / "validation.jsonl")),
            *("--test", str(folder / "test.jsonl"), "--out", str(folder / "out.json")),
        ]
    )
    return json.loads((folder / "out.json").read_text())


def test_accuracy_counts_by_split_and_kind(tmp_path: Path) -> None:
    """Two validation and two test questions, worked by hand."""
    write_jsonl(tmp_path / "validation.jsonl", [{"id": "v1"}, {"id": "v2"}])
    write_jsonl(tmp_path / "test.jsonl", [{"id": "t1"}, {"id": "t2"}])

    def row(name: str, verdict: str, tokens: int = 10, reason: str = "stop") -> dict[str, Any]:
        return {"id": name, "verdict": verdict, "num_tokens": tokens, "finish_reason": reason}

    greedy = [row("v1", "correct"), row("v2", "incorrect"), row("t1", "correct")]
    greedy.append(row("t2", "correct"))
    sampled = [row("v1", "correct"), row("v1", "correct"), row("v2", "invalid")]
    sampled += [row("v2", "unknown"), row("t1", "correct", 4), row("t1", "incorrect", 8)]
    sampled += [row("t2", "invalid", 16, "length"), row("t2", "invalid", 12)]
    files = (
        graded_file(tmp_path / "greedy.jsonl", greedy, 1),
        graded_file(tmp_path / "sampled.jsonl", sampled, 2),
    )
    assert accuracies(tmp_path, *files) == {
        "validation_greedy": 0.5,
        "validation_sampled": 0.5,
        "test_greedy": 1.0,
        "test_sampled": 0.25,
        "valid_share": 0.5,
        "mean_tokens": 10,
        "truncated_share": 0.25,
        "validation_questions": 2,
        "test_questions": 2,
        "skipped": 0,
    }


def test_a_skipped_question_counts_as_not_correct(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "validation.jsonl", [{"id": "v"}])
    write_jsonl(tmp_path / "test.jsonl", [{"id": "t1"}, {"id": "t2"}, {"id": "t3"}, {"id": "t4"}])
    row = {"verdict": "correct", "num_tokens": 10, "finish_reason": "stop"}
    greedy = [row | {"id": name} for name in ("v", "t1", "t2")]
    skipped = ("t3", "t4", "elsewhere")
    files = (
        graded_file(tmp_path / "greedy.jsonl", greedy, 1, *skipped),
        graded_file(tmp_path / "sampled.jsonl", [*greedy, *greedy], 2, *skipped),
    )
    found = accuracies(tmp_path, *files)
    assert (found["test_greedy"], found["test_sampled"], found["skipped"]) == (0.5, 0.5, 2)
    assert (found["validation_greedy"], found["mean_tokens"]) == (1.0, 10)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_accuracy_without_questions_is_refused(split: str, tmp_path: Path) -> None:
    for name in ("validation", "test"):
        write_jsonl(tmp_path / f"{name}.jsonl", [] if name == split else [{"id": "q"}])
    row = {"id": "q", "verdict": "correct", "num_tokens": 10, "finish_reason": "stop"}
    file = graded_file(tmp_path / "graded.jsonl", [row], 1)
    with pytest.raises(ValueError, match=f"{split}.jsonl: no question to measure"):
        accuracies(tmp_path, file, file)
