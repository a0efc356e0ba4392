"""The scribe recipe: its configs, its sweep, and a whole run, killed and carried on."""

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from memphis_jax import charts, report_merge
from memphis_jax import config as configs
from memphis_jax.data import procedural
from memphis_jax.report import write_report
from memphis_jax.rounds.files import read_jsonl, write_json, write_jsonl
from memphis_jax.rounds.run import claim
from memphis_jax.rounds.scribe import Scribe
from memphis_jax.rounds.scribe import _check as check
from memphis_jax.rounds.sweep import accuracy, best_t, own_ids, points

REPO = Path(__file__).parents[1]
CONFIGS = REPO / "configs"
TINY = configs.load(str(CONFIGS / "tiny_scribe.py"))
SMALL = (  # of the start: a few seconds of each stage
    *("--config.model.hidden_size=32", "--config.model.intermediate_size=64"),
    *("--config.model.num_hidden_layers=2", "--config.data.num_train=1200"),
    *("--config.data.num_validation=12", "--config.data.num_test=12"),
    *("--config.generate.questions_per_round=20", "--config.generate.num_samples=2"),
    *("--config.sft.epochs=1", "--config.rounds.num_rounds=1", "--config.rounds.eval_samples=1"),
)


# --- configs and docs


def test_the_docs_table_is_the_config() -> None:
    config = configs.load(str(CONFIGS / "memphis_scribe.py"))
    text = (REPO / "docs" / "scribe.md").read_text()
    rows = re.findall(r"^\|[^|]*\| `([\w.]+)` \| (\S+) \|$", text, re.MULTILINE)
    assert len(rows) >= 12
    for field, shown in rows:
        value = reduce(
            lambda at, name: at[name] if isinstance(at, dict) else getattr(at, name),
            field.split("."),
            config,
        )
        assert str(value) == shown, field


def test_the_scribe_starts_from_a_trained_model() -> None:
    neither = dataclasses.replace(TINY, start=configs.StartConfig())
    both = dataclasses.replace(TINY.start, hf_folder="somewhere")
    for config in (neither, dataclasses.replace(TINY, start=both)):
        with pytest.raises(configs.ConfigError, match="starts from a trained model"):
            check(config, CONFIGS)
    wrong = dataclasses.replace(TINY.start, rounds_overrides=("--config.rounds.rounds=2",))
    with pytest.raises(configs.ConfigError, match="rounds"):
        check(dataclasses.replace(TINY, start=wrong), CONFIGS)
    assert check(TINY, CONFIGS) == CONFIGS / "tiny.py"


def test_a_newer_config_field_does_not_stop_an_older_run(tmp_path: Path) -> None:
    claim(tmp_path, TINY)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["data"]["task"], saved["merge"]
    write_json(tmp_path / "config.json", saved)
    (tmp_path / "ledger").mkdir()
    write_json(tmp_path / "ledger" / "data.json", {"outputs": {"data": "0"}})
    claim(tmp_path, dataclasses.replace(TINY, data=dataclasses.replace(TINY.data, task="sums")))
    again = json.loads((tmp_path / "config.json").read_text())
    assert again["data"]["task"] == "sums" and "merge" in again


def test_the_merge_of_a_run_may_change_and_nothing_else(tmp_path: Path) -> None:
    claim(tmp_path, TINY)
    (tmp_path / "ledger").mkdir()
    write_json(tmp_path / "ledger" / "data.json", {"outputs": {"data": "0"}})
    claim(tmp_path, dataclasses.replace(TINY, merge=configs.MergeConfig(t=0.7, sweep=(0.1,))))
    with pytest.raises(configs.ConfigError, match="seed: 0 -> 5"):
        claim(tmp_path, dataclasses.replace(TINY, seed=5))


# --- the second skill


def test_the_second_skill_is_another_kind_of_question() -> None:
    rows = procedural.generate(400, 30, 30, 3, "more")
    assert rows == procedural.generate(400, 30, 30, 3, "more")
    every = [row for split in rows.values() for row in split]
    assert len({row["prompt"] for row in every}) == len(every)  # nothing is asked twice
    sums = [row for split in procedural.generate(400, 30, 30, 3).values() for row in split]
    assert not {row["id"] for row in every} & {row["id"] for row in sums}
    for row in every:
        told = re.findall(r"(\w+) has (\d+) (\w+)\.", row["prompt"])
        less, more = sorted(int(number) for _, number, _ in told)
        assert row["target"] == str(more - less) and less < more
        assert row["rationale"] == f"{more} - {less} = {more - less}."


# --- scores and the sweep


def test_questions_of_two_runs_are_told_apart(tmp_path: Path) -> None:
    """Every run numbers its questions alike; a sampler takes no id twice."""
    files = {name: tmp_path / f"{name}.jsonl" for name in ("sums", "more", "other")}
    for name, path in files.items():
        first = "test-0" if name != "other" else "q"
        write_jsonl(path, [{"id": first, "prompt": name}, {"id": f"{name}-1", "prompt": "x"}])
    apart = {name: files[name] for name in ("sums", "other")}
    assert own_ids(apart, tmp_path / "questions") == apart
    copies = own_ids(files, tmp_path / "questions")
    rows = {name: read_jsonl(path) for name, path in copies.items()}
    assert {name: found[0]["prompt"] for name, found in rows.items()} == {n: n for n in files}
    assert len({row["id"] for found in rows.values() for row in found}) == 6


def scored(*shares: tuple[float, float]) -> list[dict[str, Any]]:
    """A sweep of as many t, evenly spaced, with shares of the two skills."""
    rows = []
    for number, pair in enumerate(shares):
        cells = [{"accuracy": x, "standard_error": 0.01, "questions": 100} for x in pair]
        scores = {"sums": {"validation": cells[0]}, "most": {"validation": cells[1]}}
        rows.append({"t": number / (len(shares) - 1), "scores": scores})
    return rows


CURVE = scored((0.9, 0.2), (0.8, 0.7), (0.1, 0.9))


def scribe_of(workdir: Path, old: dict[str, list[str]], new: dict[str, list[str]]) -> Scribe:
    """Both data sets are files of one's own: {split: questions} of the start and of the scribe."""
    files = {split: f"{split}.jsonl" for split in old}
    data = configs.DataConfig(source="jsonl", tokenizer="t", **files)
    config = dataclasses.replace(TINY, data=data)
    for folder, splits in ((workdir / "cot", old), (workdir, new)):
        (folder / "data").mkdir(parents=True)
        claim(folder, config)
        for split, prompts in splits.items():
            rows = [{"id": f"{split}-{i}", "prompt": prompt} for i, prompt in enumerate(prompts)]
            write_jsonl(folder / "data" / f"{split}.jsonl", rows)
    return Scribe(workdir, config, cot=workdir / "tiny.py")


def test_two_data_sets_of_ones_own_are_two_skills(tmp_path: Path) -> None:
    old = {"train": ["a"], "validation": ["b"], "test": ["c"]}
    new = {"train": ["d"], "validation": ["e"], "test": ["f", "g"]}
    tasks = scribe_of(tmp_path, old, new).tasks()
    rows = [read_jsonl(path) for splits in tasks.values() for path in splits.values()]
    assert [[row["prompt"] for row in found] for found in rows] == [["b"], ["c"], ["e"], ["f", "g"]]
    assert list(tasks) == ["CoT questions of the start", "CoT questions"]
    assert len({row["id"] for found in rows for row in found}) == 5


def test_the_same_questions_are_one_skill(tmp_path: Path) -> None:
    splits = {"train": ["a"], "validation": ["b"], "test": ["c"]}
    assert list(scribe_of(tmp_path, splits, splits).tasks()) == ["CoT questions"]


@pytest.mark.parametrize("leaks", ["old", "new"])
def test_a_question_held_out_by_one_and_trained_by_the_other_is_refused(
    tmp_path: Path, leaks: str
) -> None:
    one = {"train": ["a", "f"], "validation": ["b"], "test": ["c"]}
    other = {"train": ["d"], "validation": ["e"], "test": ["f"]}
    scribe = scribe_of(tmp_path, *((one, other) if leaks == "old" else (other, one)))
    with pytest.raises(configs.ConfigError, match=r"1 held-out questions of .*train.jsonl.* 'f'"):
        scribe.tasks()


def test_the_best_t_has_the_highest_mean_and_is_the_lowest_of_equals() -> None:
    assert best_t(CURVE) == 0.5
    assert best_t(scored((0.9, 0.2), (0.2, 0.3), (0.1, 1.0))) == 0.0
    assert best_t([]) is None
    assert points(CURVE)["most"] == [(0.0, 20, 1), (0.5, 70, 1), (1.0, 90, 1)]


def test_the_chart_is_written_as_png_and_svg(tmp_path: Path) -> None:
    png, svg = charts.save_tradeoff(points(CURVE), tmp_path / "sweep")
    assert png.read_bytes().startswith(b"\x89PNG") and "<svg" in svg.read_text()
    assert ">sums</text>" in svg.read_text()
    before = svg.read_bytes()
    charts.save_tradeoff(points(CURVE), tmp_path / "sweep")
    assert svg.read_bytes() == before


def test_an_accuracy_is_of_all_questions_asked(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "v.jsonl", [{"id": f"v{i}"} for i in range(1, 5)])
    found = accuracy(tmp_path / "v.jsonl", {"v1", "elsewhere"})
    error = pytest.approx((0.25 * 0.75 / 4) ** 0.5)
    assert found == {"accuracy": 0.25, "questions": 4, "standard_error": error}
    write_jsonl(tmp_path / "none.jsonl", [])
    with pytest.raises(ValueError, match=r"none.jsonl: no question"):
        accuracy(tmp_path / "none.jsonl", set())


# --- the report


def test_the_report_of_a_scribe_run(tmp_path: Path) -> None:
    claim(tmp_path, TINY)
    cell = {"accuracy": 0.5, "standard_error": 0.05, "questions": 100}
    splits = {"validation": cell, "test": cell}
    shares = {"start": 0.99, "finetuned": 0.01, "merged": 0.875}
    models = {
        name: {"sums": {**splits, "test": {**cell, "accuracy": share}}, "most": splits}
        for name, share in shares.items()
    }
    write_json(tmp_path / "results.json", {"models": models, "sweep": CURVE, "best_t": 0.5})
    row = {"t": 0.4, "branch": "linear", "why": "parallel", "angle": 1.25}
    row |= {"norm_a": 2.0, "norm_b": 2.0, "norm": 2.0, "distance": 0.5}
    rows = {f"model.layers.{i}.mlp.up_proj.weight": {**row, "angle": 1.25 + i} for i in range(3)}
    head = {"method": "slerp", "t": 0.4, "threshold": 0.9995, "num_tensors": 3}
    head |= {"num_elements": 30, "branches": {"linear": {"tensors": 3, "elements": 30}}}
    head |= {"linear_because": {"parallel": {"tensors": 3, "elements": 30}}}
    head |= {"angle": {"least": 1.25, "median": 2.25, "most": 3.25}, "tensors": rows}
    (tmp_path / "merged" / "hf").mkdir(parents=True)
    write_json(tmp_path / "merged" / "hf" / "merge.json", head)
    metrics = {"exact_match,strict-match": {"value": 0.1228, "stderr": 0.009}}
    tasks = {"gsm8k": {"metrics": metrics, "questions": 1319, "num_fewshot": 5}}
    (tmp_path / "eval" / "merged-lm").mkdir(parents=True)
    write_json(tmp_path / "eval" / "merged-lm" / "results.json", {"tasks": tasks})
    page = write_report(tmp_path).read_text()
    assert "sums 99.0 % → 1.0 % finetuned → 87.5 % merged; most 50.0 %" in page
    assert 'aria-label="Accuracy on held-out questions by t"' in page
    assert "<td>model.layers.*.mlp.up_proj.weight</td><td>3</td><td>0.4</td>" in page
    assert "2.250°" in page and "0.2500" in page and "linear (parallel)" in page
    assert "SLERP fell back to linear: parallel: 3 of 3 tensors" in page
    assert "<td>exact_match,strict-match, 5-shot</td>" in page and "12.28 <small>± 0.90" in page
    assert "Read the pairs" not in page and "round*/pairs" not in page
    assert report_merge.kinds(head)[0]["moved"] == 0.25


# --- a whole run


def start(workdir: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "memphis_jax", "scribe", "--workdir", str(workdir)]
    words += ["--config", str(CONFIGS / "tiny_scribe.py"), "--config.merge.sweep=(0.4, 0.7)"]
    words += ["--config.data.num_train=300", "--config.data.num_validation=12"]
    words += ["--config.data.num_test=12", f"--config.start.rounds_overrides={SMALL!r}"]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=workdir.parent,
    )


def finish(workdir: Path) -> str:
    process = start(workdir)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def results(workdir: Path) -> dict[str, Any]:
    found = json.loads((workdir / "results.json").read_text())
    return {name: value for name, value in found.items() if name != "seconds"}


def weights(workdir: Path) -> dict[str, bytes]:
    paths = sorted(workdir.rglob("*.safetensors"))
    return {str(path.relative_to(workdir)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("scribe") / "undisturbed"
    output = finish(workdir)
    assert "accuracy on test questions" in output and str(workdir / "report.html") in output
    return workdir


@pytest.mark.slow
def test_a_run_ends_with_both_skills_of_three_models_and_a_sweep(undisturbed: Path) -> None:
    found = results(undisturbed)
    for model in ("start", "finetuned", "merged"):
        for skill in ("sums", "more"):
            assert found["models"][model][skill]["test"]["questions"] == 12
    # t = 0.4 is the merge itself, so only 0.7 was made for the sweep
    assert [row["t"] for row in found["sweep"]] == [0.4, 0.7]
    assert found["sweep"][0]["scores"] == found["models"]["merged"]
    assert [path.name for path in undisturbed.glob("sweep-*")] == ["sweep-t0.7"]
    report = json.loads((undisturbed / "merged" / "hf" / "merge.json").read_text())
    assert report["t"] == 0.4 and report["angle"]["most"] > 0
    assert (undisturbed / "sweep.png").is_file()
    assert "Skills before and after the merge" in (undisturbed / "report.html").read_text()
    assert read_jsonl(undisturbed / "eval" / "merged" / "completions.jsonl")


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_with_the_same_bits(
    undisturbed: Path, tmp_path: Path
) -> None:
    moments = random.Random(11)
    for _ in range(3):
        process = start(tmp_path / "killed")
        time.sleep(moments.uniform(5.0, 25.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(tmp_path / "killed")
    assert results(tmp_path / "killed") == results(undisturbed)
    assert weights(tmp_path / "killed") == weights(undisturbed)


@pytest.mark.slow
def test_a_sweep_by_hand_is_the_recipes(undisturbed: Path) -> None:
    """`memphis merge --sweep` on the folders of the run, scored on one of its skills."""
    out = undisturbed.parent / "sweep"
    words = [sys.executable, "-m", "memphis_jax", "merge", "--out", str(out), "--sweep", "0,0.7"]
    words += [str(undisturbed / name / "hf") for name in ("start", "sft")]
    words += ["--config", str(CONFIGS / "tiny_scribe.py")]
    words += ["--task", f"more={undisturbed / 'data' / 'validation.jsonl'}"]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"}
    subprocess.run(words, check=True, env=environment, cwd=out.parent)
    rows = json.loads((out / "sweep.json").read_text())["sweep"]
    found = results(undisturbed)
    for row, scores in (
        (rows[0], found["models"]["start"]),
        (rows[1], found["sweep"][1]["scores"]),
    ):
        assert row["scores"]["more"]["validation"] == scores["more"]["validation"]
    assert (out / "sweep.svg").is_file()
