"""Facts about reading: which files, broken ones, missing columns, the hub at a pinned commit."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_fixtures import DATA_SETS, good, hub, texts, write, write_file

from memphis_jax.config import MixtureEntry
from memphis_jax.data import sources
from memphis_jax.data.recipes import RECIPES, Loaded, load

ALL = 10**6  # more rows than there are: nothing is sampled


def load_all(name: str, root: Path) -> Loaded:
    return load(name, MixtureEntry(rows=ALL), str(root), 0)


def test_a_copy_may_lie_under_its_name_alone(tmp_path: Path) -> None:
    data = DATA_SETS["coedit"]
    write(tmp_path / "coedit-reworded-deduped", data.rows(), "csv", data.schema)
    assert load_all("coedit", tmp_path).rows_in == len(data.rows())


def test_a_missing_copy_names_both_places(tmp_path: Path) -> None:
    owner, name = tmp_path / "euclaise/TinyCoT", tmp_path / "TinyCoT"
    with pytest.raises(FileNotFoundError, match=re.escape(f"looked for {owner} and {name}")):
        load_all("tinycot", tmp_path)


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv"])
def test_a_missing_column_shows_expected_and_found(tmp_path: Path, form: str) -> None:
    rows = good(3, post_title=lambda n, text: "t", post_body=lambda n, text: "b")
    write_file(tmp_path / f"train.{form}", rows, texts("post_title", "post_body"))
    with pytest.raises(ValueError) as caught:
        load("reddit_instruct", MixtureEntry(path=str(tmp_path)), "", 0)
    message = str(caught.value)
    assert message == (
        f"{tmp_path / f'train.{form}'} has no column 'post_text', 'comment_text'; expected "
        "post_title (text), post_text (text), comment_text (text); found post_title, post_body"
    )


def test_files_of_the_split_are_taken_by_name(tmp_path: Path) -> None:
    def prompts(split: str = "train") -> set[str]:
        loaded = load("tinycot", MixtureEntry(path=str(tmp_path), split=split), "", 0)
        return {item["prompt"] for item in loaded.items}

    def put(name: str, prompt: str) -> None:
        row = {"prompt": prompt, "rationale": "r", "target": "t", "source": "s"}
        write_file(tmp_path / name, [row], texts(*row))

    put("part-1.jsonl", "plain")
    put("test.jsonl", "test")
    assert prompts() == {"plain"}  # the only files that name no split
    assert prompts("test") == {"test"}
    put("train/a.jsonl", "a")
    put("data/train-00000-of-00001.jsonl", "b")
    put(".cache/train.jsonl", "hidden")
    assert prompts() == {"a", "b"}
    with pytest.raises(ValueError, match=r"has \.csv and \.jsonl files for train"):
        put("train.csv", "c")
        prompts()


def test_no_file_for_a_split_lists_what_is_there(tmp_path: Path) -> None:
    write_file(tmp_path / "test.jsonl", [{"prompt": "p"}], texts("prompt"))
    with pytest.raises(FileNotFoundError, match=r"file of split 'train'; found test\.jsonl"):
        load("tinycot", MixtureEntry(path=str(tmp_path)), "", 0)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        load("tinycot", MixtureEntry(path=str(tmp_path / "nowhere")), "", 0)


HEADER = b"prompt,rationale,target,source\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "p"}\n{"prompt"\n', "line 2: not JSON"),
        ("a.jsonl", b"\xff\xfe\n", "line 1: not JSON"),
        ("a.jsonl", b"[1]\n", r"line 1: \[1\] is not a JSON object"),
        ("a.jsonl", b"", "found none"),
        ("a.parquet", b"PAR1 not really", "cannot be read: ArrowInvalid"),
        ("a.csv", HEADER + b"p,r,t\n", "cannot be read: ArrowInvalid: CSV parse error"),
        ("a.csv", HEADER + b"caf\xe9,r,t,s\n", "cannot be read"),
        ("a.csv", b"", "found none"),
        ("a.csv", HEADER, "none of its rows can be used; dropped none"),
        (
            "a.csv",
            HEADER + b",r,t,s\n",
            r"none of its rows can be used; dropped {'empty prompt': 1}",
        ),
        ("a.txt", b"", r"a\.txt has \.txt files for train: give one form of \.parquet, \.jsonl"),
    ],
)
def test_broken_files_are_named_in_one_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load("tinycot", MixtureEntry(path=str(tmp_path / name)), "", 0)
    assert len(str(caught.value).splitlines()) == 1


def test_a_byte_order_mark_is_no_part_of_a_csv_header(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + HEADER + b"p,r,t,s\n")
    assert len(load("tinycot", MixtureEntry(path=str(tmp_path / "a.csv")), "", 0).items) == 1


def test_csv_rows_may_reach_over_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "\n".join("abcdefgh")
    rows = [{"prompt": f"{n}", "rationale": lines, "target": "t", "source": "s"} for n in range(99)]
    write_file(tmp_path / "train.csv", rows, texts(*rows[0]))
    monkeypatch.setattr(sources, "CSV_BLOCK", 100)  # a row has about 30 bytes
    loaded = load("tinycot", MixtureEntry(path=str(tmp_path)), "", 0)
    assert loaded.items == rows


# --- the hub: its libraries against a server on this machine, in a process that knows no other

LOAD = """
import json, sys
from memphis_jax.config import MixtureEntry
from memphis_jax.data.recipes import load

for name in sys.argv[1:]:
    try:
        print(json.dumps(load(name, MixtureEntry(rows=10**6), "", 0)))
    except RuntimeError as error:
        print(json.dumps(str(error)))
"""


@pytest.mark.slow
def test_the_hub_gives_the_same_rows_at_the_pinned_commit(tmp_path: Path) -> None:
    pinned = RECIPES["oasst2_curated"].revision
    names = ["booksum_short", "oasst2_curated", "tinycot", "mathqa_programs"]
    # TinyCoT's commit is another than the recipe's.
    commits = ["b" * 40, pinned, "c" * 40, RECIPES["mathqa_programs"].revision]
    copies = {}
    for name, commit, form in zip(names, commits, ("csv", "parquet") * 2, strict=True):
        data = DATA_SETS[name]
        copies[data.repo] = (tmp_path / data.repo, commit)
        if name != "mathqa_programs":
            write(tmp_path / data.repo, data.rows(), form, data.schema)
    digits = [{"problem": "007", "program": "12"}]  # a whole column that looks like numbers
    write_file(tmp_path / "euclaise/mathqa_programs/train.csv", digits, texts(*digits[0]))
    patient = {f"HF_HUB_{what}_TIMEOUT": "120" for what in ("ETAG", "DOWNLOAD")}  # a busy machine
    with hub(copies) as (address, asked):
        out = subprocess.run(
            [sys.executable, "-c", LOAD, *names],
            env={
                **os.environ,
                **patient,
                "HF_HUB_OFFLINE": "0",  # another test of this process may have set it
                "HF_DATASETS_OFFLINE": "0",
                "HF_ENDPOINT": address,
                "HF_HOME": str(tmp_path / "home"),
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    booksum, oasst2, refused, mathqa = map(json.loads, out.splitlines())
    for found, name in ((booksum, names[0]), (oasst2, names[1]), (mathqa, names[3])):
        assert isinstance(found, list), found  # the error, whole
        assert found[:4] == json.loads(json.dumps(load_all(name, tmp_path)[:4]))
    assert booksum[4]["revision"] == "b" * 40  # none is pinned: the one that the hub has
    assert (oasst2[4]["repo"], oasst2[4]["revision"]) == ("sablo/oasst2_curated", pinned)
    assert not any("sablo" in path and pinned not in path for path in asked)
    start = f"cannot load euclaise/TinyCoT, split train, revision {RECIPES['tinycot'].revision}, "
    assert refused.startswith(start) and "\n" not in refused
    assert refused.endswith("give a local copy with --config.data.root=FOLDER")


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_column_that_is_there_twice_is_refused(tmp_path: Path, form: str) -> None:
    """The first would be read, and nobody told."""
    path = tmp_path / f"rows.{form}"
    if form == "csv":
        path.write_text("q,q,a\nx,y,z\n")
    else:
        arrays = [pa.array([text]) for text in "xyz"]
        pq.write_table(pa.Table.from_arrays(arrays, names=["q", "q", "a"]), path)
    with pytest.raises(ValueError, match=f"{path} has the column 'q' more than once"):
        list(sources.read_local(path, "train", {"q": "text", "a": "text"}).rows)


def test_a_folder_that_is_named_like_a_file_is_none(tmp_path: Path) -> None:
    (tmp_path / "old.jsonl").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"q": "x"}\n')
    assert list(sources.read_local(tmp_path, "train", {"q": "text"}).rows) == [{"q": "x"}]
