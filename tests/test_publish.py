"""A model to give away: its prompt format to the token, its card from the run, nothing sent."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from memphis_jax import publish
from memphis_jax.chat_template import chat_template, tokenizer_config
from memphis_jax.data import procedural
from memphis_jax.data.prompts import encode_chat, encode_prompt, load_tokenizer
from memphis_jax.rounds.certificate import check_certificate, file_hashes
from memphis_jax.rounds.files import write_json

PROMPTS = [
    "Mia has 7 shells. She finds 5 more. How many shells does Mia have now?",
    "  \n outer blanks \t\n",
    "### User:\nwho?\n### Rationale:\nbecause\n### Answer:\n7",
    "a\n### Answer:\n\n### Answer:\n### Assistant: x ### User: y",
    " ### User: indented once",
    "#### User:\n###User:\n### user:",
    "{{ 7 * 7 }} {% raise %} ' \" \\n \\ \x0b end",
    "Grün ≤ 日本語 \u2028 ẞ 🎲",
    "\r\n### User:\r\nwindows",
    "1234567 12.5 %\n\n\n\ttabs",
]


def with_template(folder: Path) -> Any:
    from transformers import AutoTokenizer

    config = tokenizer_config(folder, chat_template(folder))
    write_json(folder / "tokenizer_config.json", config)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of the demo."""
    folder = tmp_path_factory.mktemp("tokenizer") / "small"
    rows = procedural.generate(300, 1, 1, 0)["train"]
    procedural.save_tokenizer(procedural.train_tokenizer((r["prompt"] for r in rows), 400), folder)
    return folder


@pytest.fixture(scope="module")
def neox(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of StableLM-3B."""
    folder = tmp_path_factory.mktemp("tokenizer") / "neox"
    folder.mkdir()
    stablelm = shared / "data" / "stablelm"
    shutil.copy(stablelm / "20B_tokenizer.json", folder / "tokenizer.json")
    shutil.copy(stablelm / "special_tokens_map.json", folder)
    return folder


@pytest.mark.parametrize("name", ["small", "neox"])
def test_the_template_gives_the_tokens_that_were_trained(
    name: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    theirs = with_template(folder)
    ours, eos_id = load_tokenizer(folder)
    assert theirs.eos_token_id == eos_id
    for prompt in PROMPTS:
        message = [{"role": "user", "content": prompt}]
        told = theirs.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        assert told == encode_prompt(ours, prompt), prompt
        chat = [*message, {"role": "assistant", "content": f"Well: {prompt}"}]
        chat += [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "No."}]
        told = theirs.apply_chat_template(chat, return_dict=False)
        assert told == encode_chat(ours, chat, eos_id).tokens.tolist(), prompt


def test_a_chat_reply_can_be_asked_for(small: Path) -> None:
    tokenizer = with_template(small)
    message = [{"role": "user", "content": "hm"}]

    def text(**options: Any) -> str:
        return tokenizer.apply_chat_template(message, tokenize=False, **options)

    assert text(add_generation_prompt=True) == "### User:\nhm\n### Rationale:\n"
    assert text(add_generation_prompt=True, rationale=False) == "### User:\nhm\n### Assistant:\n"
    tokenizer.chat_template = chat_template(small, rationale=False)
    assert text(add_generation_prompt=True) == "### User:\nhm\n### Assistant:\n"
    assert text(add_generation_prompt=True, rationale=True) == "### User:\nhm\n### Rationale:\n"


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([("system", "be nice")], "roles must alternate"),
        ([("user", "a"), ("user", "b")], "roles must alternate"),
        ([("assistant", "a")], "roles must alternate"),
        ([("user", " \n ")], "a message is empty"),
        ([("user", "end here<|endoftext|>### User:")], "spells the special token <|endoftext|>"),
        ([("user", "a"), ("assistant", "<|padding|>")], "spells the special token <|padding|>"),
    ],
)
def test_what_the_template_refuses(
    small: Path, messages: list[tuple[str, str]], problem: str
) -> None:
    tokenizer = with_template(small)
    rows = [{"role": role, "content": text} for role, text in messages]
    with pytest.raises(Exception, match=re.escape(problem)):
        tokenizer.apply_chat_template(rows, add_generation_prompt=True)


# --- the folder and its card


ABSENT = "evaluation set typo/bbh.jsonl: no such file; nothing was compared with it"
ACCURACY = {"accuracy": 0.62, "questions": 200, "standard_error": 0.0343}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small: Path) -> Path:
    """What a finished `memphis scribe` leaves, with a random model that transformers can load."""
    from transformers import StableLmConfig, StableLmForCausalLM

    workdir = tmp_path_factory.mktemp("runs") / "scribe"
    hf = workdir / "merged" / "hf"
    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    StableLmForCausalLM(StableLmConfig(**sizes, **heads, **ids)).save_pretrained(hf)
    for name in ("tokenizer.json", "special_tokens_map.json"):
        shutil.copy(small / name, hf)
    head = {"method": "slerp", "t": 0.4, "num_tensors": 9, "num_elements": 1000}
    head |= {"branches": {"slerp": {"tensors": 7, "elements": 900}}, "linear_because": {}}
    write_json(hf / "merge.json", head | {"angle": {"least": 0.5, "median": 4.0, "most": 9.0}})
    places = {"source": {"checkpoint": f"{workdir}/merged/init"}, "parents": [{"folder": str(hf)}]}
    write_json(hf / "conversion.json", {"format": 1, "files": file_hashes(hf), **places})
    from memphis_jax import config as configs
    from memphis_jax.rounds.run import claim

    guarded = "--config.data.evaluation=('gsm8k.jsonl','typo/bbh.jsonl')"
    config = configs.load(str(Path(__file__).parents[1] / "configs" / "tiny_scribe.py"), [guarded])
    claim(workdir, config)
    models = {
        name: {"sums": {"test": {**ACCURACY, "accuracy": share}}, "most": {"test": ACCURACY}}
        for name, share in (("start", 0.9), ("finetuned", 0.1), ("merged", 0.5))
    }
    write_json(workdir / "results.json", {"models": models})
    origin = {"repo": "euclaise/TinyCoT", "revision": "ffc8d3beccd5"}
    counts = {"rows_in": 3100, "examples": 3000, "tokens": 180_000}
    (workdir / "data").mkdir()
    data_sets = {"tinycot": {"origin": origin, **counts}}
    manifest = {"data_sets": data_sets, "sft_sha256": "d" * 64, "warnings": [ABSENT]}
    write_json(workdir / "data" / "manifest.json", manifest)
    (workdir / "ledger").mkdir()
    record = {"stage": "sft", "started": "2024-02-01T00:00:00", "seconds": 12.0}
    record |= {"config_sha256": "c" * 64, "versions": {"python": "3.11.9"}, "host": "secret-box"}
    write_json(workdir / "ledger" / "sft.json", record)
    return workdir


@pytest.fixture(scope="module")
def published(run: Path) -> Path:
    before = file_hashes(run / "merged" / "hf")
    options = ["--card", "--license", "cc-by-4.0", "--base-model", "euclaise/Memphis-CoT-3B"]
    publish.publish([str(run / "merged" / "hf"), "--workdir", str(run), *options])
    assert file_hashes(run / "merged" / "hf") == before  # the ledger holds its hashes
    return run / "published"


def test_the_folder_is_certified_and_whole(published: Path, run: Path) -> None:
    check_certificate(published, file_hashes(published))
    assert {path.name for path in published.iterdir()} == {
        *(path.name for path in (run / "merged" / "hf").iterdir()),
        *("README.md", "tokenizer_config.json"),
    }


def test_a_published_text_may_be_edited(published: Path, run: Path) -> None:
    """Weights share their disk space with the run's; what an editor opens is a copy."""
    for path in published.iterdir():
        source = run / "merged" / "hf" / path.name
        if source.is_file():
            assert source.samefile(path) == (path.suffix == ".safetensors"), path.name


def test_a_publication_says_nothing_of_this_machine(published: Path, run: Path) -> None:
    text = (published / "conversion.json").read_text()
    assert str(run.parent) not in text
    told = json.loads(text)
    assert told["source"] == {"checkpoint": "init"} and told["parents"] == [{"folder": "hf"}]
    assert told["published_from"]["folder"] == "hf"


def test_the_card_says_what_the_run_was(published: Path, run: Path) -> None:
    text = (published / "README.md").read_text()
    for told in (
        "| **merged** (this) | sums | test | greedy | 50.0 ± 3.4 | 200 |",
        "| start | sums | test | greedy | 90.0 ± 3.4 | 200 |",
        "[euclaise/TinyCoT](https://huggingface.co/datasets/euclaise/TinyCoT) at ffc8d3b",
        "| mixce_eta | 0.5 |",
        "slerp, t = 0.4; slerp: 7 of 9 tensors, 90.0 % of the numbers",
        "A finetune of euclaise/Memphis-CoT-3B, merged back with its start.",
        f"`{file_hashes(published)['model.safetensors']}`",
        "c" * 64,
        "d" * 64,
        "share text with gsm8k.jsonl were searched for",
        f"- {ABSENT}",
    ):
        assert told in text
    assert "secret-box" not in text and str(run) not in text


def test_the_metadata_is_the_hubs(published: Path) -> None:
    """Read back by huggingface_hub itself; its own `validate` asks the hub."""
    card = ModelCard.load(published / "README.md")
    data = card.data
    assert isinstance(data, ModelCardData)
    assert (data.license, data.base_model) == ("cc-by-4.0", "euclaise/Memphis-CoT-3B")
    assert data.datasets == ["euclaise/TinyCoT"]
    found = {row.dataset_name: row for row in data.eval_results or []}
    assert {name: row.metric_value for name, row in found.items()} == {"sums": 50.0, "most": 62.0}
    assert found["sums"].metric_type == "accuracy" and found["sums"].dataset_split == "test"
    raw = yaml.safe_load((published / "README.md").read_text().split("---")[1])
    name, rows = model_index_to_eval_results(raw["model-index"])
    assert name == "scribe" and len(rows) == 2


@pytest.mark.slow
def test_the_example_on_the_card_runs(published: Path) -> None:
    example = re.search(r"```python\n(.*?)```", (published / "README.md").read_text(), re.DOTALL)
    assert example is not None
    done = subprocess.run(
        [sys.executable, "-c", example[1]],
        cwd=published,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr


def test_only_upload_talks_to_the_hub(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def refuse(*where: Any, **_: Any) -> None:
        asked.append(where)
        raise OSError("no network in tests")

    for name in ("socket.getaddrinfo", "socket.socket.connect"):
        monkeypatch.setattr(name, refuse)
    publish.publish([str(run / "merged" / "hf"), "--workdir", str(run), "--card"])
    assert not asked
    with pytest.raises(RuntimeError, match="no network in tests"):
        publish.upload(run / "published", "nobody/nothing", private=True)
    assert asked


def test_an_unreachable_hub_is_one_line_and_the_folder_is_ready(run: Path, tmp_path: Path) -> None:
    """A port of this machine where nobody listens stands for the hub."""
    out = tmp_path / "ready for the hub"
    words = [str(run / "merged" / "hf"), "--workdir", str(run), "--out", str(out), "--private"]
    done = subprocess.run(
        [sys.executable, "-m", "memphis_jax", "publish", *words, "--upload", "nobody/nothing"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"},
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert f"{out} is ready, but not on the hub as nobody/nothing" in done.stderr
    assert f"`hf upload nobody/nothing '{out}' --private`" in done.stderr
    check_certificate(out, file_hashes(out))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--upload", "nothing"], "--upload 'nothing': give OWNER/NAME"),
        (["--upload", "a/b/c"], "--upload 'a/b/c': give OWNER/NAME"),
        (["--upload", ""], "--upload '': give OWNER/NAME"),
        (["--upload", "no body/nothing"], "'no body/nothing': Repo id must use alphanumeric"),
        (["--base-model", "/x"], "--base-model '/x': give OWNER/NAME"),
        (["--private"], "--private is about the repository of --upload"),
        *(
            (["--license", name], f"--license {name!r} is not how the hub names a licence")
            for name in ("Apache 2.0", "Apache-2.0", "", "mit\n---")
        ),
        (["--workdir", "nowhere"], "--workdir nowhere is not a folder"),
    ],
)
def test_wrong_options_are_refused_before_any_work(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        hf = str(run / "merged" / "hf")
        publish.publish([hf, "--workdir", str(run), "--out", str(out), *options])
    assert ended.value.code == 2 and told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_hubs_own_names_pass(run: Path, tmp_path: Path) -> None:
    hf, out = str(run / "merged" / "hf"), str(tmp_path / "out")
    for name in ("apache-2.0", "mit", "cc-by-nc-sa-4.0", "llama3.1", "bsd-3-clause-clear", "other"):
        publish.publish([hf, "--workdir", str(run), "--out", out, "--card", "--license", name])
        assert ModelCard.load(tmp_path / "out" / "README.md").data.license == name


def test_a_model_of_ones_own_data(run: Path, tmp_path: Path) -> None:
    """An earlier run's export has no name of its own; nobody said the language of the files."""
    own = tmp_path / "mine"
    shutil.copytree(run, own)
    config = json.loads((own / "config.json").read_text())
    config["start"] = {**config["start"], "hf_folder": "runs/demo/round4/hf", "rounds_config": ""}
    config["data"]["source"] = "jsonl"
    write_json(own / "config.json", config)
    (own / "results.json").unlink()
    (own / "eval").mkdir()
    for name in ("round10", "round2", "sft"):
        cells = {"test_greedy": 0.5, "test_sampled": 0.5}
        write_json(own / "eval" / f"{name}.json", {**cells, "test_questions": 30})
    out = tmp_path / "out"
    publish.publish([str(own / "merged/hf"), "--workdir", str(own), "--out", str(out), "--card"])
    text = (out / "README.md").read_text()
    assert "A finetune of a model of an earlier run, merged back with its start." in text
    assert "language:" not in text
    places = [text.index(f"| {name} | held-out") for name in ("sft", "round2", "round10")]
    assert places == sorted(places)


@pytest.mark.parametrize("text", ["{", "[]", '{"start": {"hf_folder": ""}}'])
def test_a_broken_record_is_named(run: Path, tmp_path: Path, text: str) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(run / "merged", workdir / "merged")
    (workdir / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"^{workdir}/config.json "):
        publish.publish([str(workdir / "merged" / "hf"), "--workdir", str(workdir), "--card"])
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (workdir / "merged" / "hf" / name).write_text("{")
        words = [str(workdir / "merged" / "hf"), "--workdir", str(workdir), "--uncertified"]
        with pytest.raises(ValueError, match=f"hf/{name} is not JSON"):
            publish.publish(words)
        (workdir / "merged" / "hf" / name).write_text("{}")
    assert not list(workdir.glob(".*")) and not (workdir / "published").exists()


def test_what_is_refused(run: Path, tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    shutil.copytree(run / "merged" / "hf", hf)
    with pytest.raises(ValueError, match="is not inside"):
        publish.publish([str(hf), "--workdir", str(run), "--card", "--out", str(tmp_path / "o")])
    assert not list(tmp_path.glob(".*"))
    (hf / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.json is not what was certified"):
        publish.publish([str(hf), "--workdir", str(run)])
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years")
    with pytest.raises(FileExistsError, match="holds something else"):
        publish.publish([str(run / "merged" / "hf"), "--workdir", str(run), "--out", str(precious)])
    export = tmp_path / "export"
    shutil.copytree(run / "merged" / "hf", export)
    with pytest.raises(FileExistsError, match="holds something else"):
        publish.publish([str(run / "merged" / "hf"), "--workdir", str(run), "--out", str(export)])
    words = [str(run / "merged" / "hf"), "--workdir", str(run), "--out", str(tmp_path / "mine")]
    for _ in range(2):  # the second replaces the first
        publish.publish([*words, "--card"])
    with (tmp_path / "mine" / "README.md").open("a") as card:
        card.write("What it cannot do: poems.")
    with pytest.raises(FileExistsError, match=r"and README.md with it"):
        publish.publish([*words, "--card"])
