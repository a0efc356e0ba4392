"""Facts about the files between stages: what is refused; a reader never sees half a file."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from memphis_jax.rounds import files


def test_rows_survive_a_round_trip_byte_for_byte(tmp_path):
    rows = [
        {"id": "q1", "text": "line\nbreak, \u2028 separator, \x85, é, 数"},
        {"id": "q2", "num_tokens": 3, "nested": {"a": [1, 2.5, None, True]}},
    ]
    path = tmp_path / "rows.jsonl"
    files.write_jsonl(path, rows)
    assert files.read_jsonl(path) == rows
    assert path.read_bytes().count(b"\n") == 2
    assert "é, 数".encode() in path.read_bytes()
    first = path.read_bytes()
    files.write_jsonl(path, files.read_jsonl(path))
    assert path.read_bytes() == first
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_last_line_may_lack_its_newline_and_no_rows_is_an_empty_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}')
    assert files.read_jsonl(path) == [{"a": 1}, {"a": 2}]
    files.write_jsonl(path, [])
    assert path.read_bytes() == b""
    assert files.read_jsonl(path) == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": "q2", "text": "cut sho', "not JSON"),
        (b"", "empty line"),
        (b"   ", "empty line"),
        (b"[1, 2]", "found list"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": 1} {"b": 2}', "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "q1"}\n' + line + b'\n{"id": "q3"}\n')
    with pytest.raises(ValueError, match=reason) as error:
        files.read_jsonl(path)
    assert f"{path}, line 2:" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_json_cannot_hold_is_refused_and_the_old_file_stays(tmp_path):
    path = tmp_path / "rows.jsonl"
    files.write_jsonl(path, [{"a": 1}])
    for bad in (float("nan"), {1, 2}, "\ud800"):
        with pytest.raises(ValueError, match="row 2"):
            files.write_jsonl(path, [{"a": 2}, {"a": bad}])
    assert files.read_jsonl(path) == [{"a": 1}]
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_windows_files_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xe2\x80\xa8\xef\xbb\xbf"}\r\n{"a": 2}\r\n')
    assert files.read_jsonl(path) == [{"a": "\u2028\ufeff"}, {"a": 2}]


def test_where_there_is_no_room_is_said_and_nothing_is_left(tmp_path):
    code = """
import resource, sys
from pathlib import Path
from memphis_jax.rounds import files

def in_new_folder(target):
    with files.new_folder(target) as folder:
        (folder / "part").write_bytes(bytes(2000))

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
here = Path(sys.argv[1])
for work in (
    lambda: files.write_json(here / "row.json", "a" * 2000),
    lambda: in_new_folder(here / "model"),
):
    try:
        work()
    except OSError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        f"[Errno 27] File too large: '{tmp_path / name}'" for name in ("row.json", "model")
    ]
    assert os.listdir(tmp_path) == []


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    with pytest.raises(IsADirectoryError, match=f"^{tmp_path} is a folder, where a file"):
        files.write_json(tmp_path, {})
    assert not list(tmp_path.parent.glob(f"{tmp_path.name}*.tmp"))


def test_completions_have_a_header(tmp_path):
    path = tmp_path / "completions.jsonl"
    files.write_jsonl(path, [{"meta": {"engine": "jax"}}, {"id": "q1", "sample": 0}])
    assert files.read_completions(path) == ({"engine": "jax"}, [{"id": "q1", "sample": 0}])
    for rows in ([], [{"id": "q1"}], [{"meta": 3}], [{"meta": {}, "id": "q1"}]):
        files.write_jsonl(path, rows)
        with pytest.raises(ValueError, match="line 1: expected the header"):
            files.read_completions(path)


def test_kill_9_while_writing_leaves_the_old_file_or_the_new(tmp_path):
    path = tmp_path / "state.json"
    files.write_json(path, {"n": -1, "fill": "x"})
    code = (
        "import sys, itertools; from memphis_jax.rounds.files import write_json\n"
        "for n in itertools.count(): write_json(sys.argv[1], {'n': n, 'fill': 'x' * 300_000})"
    )
    for delay in (0.03, 0.07, 0.15):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)])
        before = path.stat().st_mtime_ns
        while path.stat().st_mtime_ns == before:
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        state = json.loads(path.read_text())
        assert state["fill"] == "x" * 300_000
    files.write_json(path, {"n": "after"})  # what was left behind is in nobody's way
    assert os.listdir(tmp_path) == ["state.json"]


def test_folder_hash_sees_names_and_contents_and_nothing_else(tmp_path):
    def folder(name, contents):
        for relative, text in contents.items():
            file = tmp_path / name / relative
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return files.sha256_folder(tmp_path / name)

    base = folder("a", {"b.txt": "2", "sub/a.txt": "1"})
    assert base == folder("copy", {"sub/a.txt": "1", "b.txt": "2"})
    assert base != folder("content", {"b.txt": "2", "sub/a.txt": "x"})
    assert base != folder("name", {"b.txt": "2", "sub/c.txt": "1"})
    assert base != folder("swapped", {"b.txt": "1", "sub/a.txt": "2"})
    assert base != folder("more", {"b.txt": "2", "sub/a.txt": "1", "empty": ""})
    assert base == folder("cut", {"b.txt": "2", "sub/a.txt": "1", "5.orbax-checkpoint-tmp/x": ""})
    one, two = (hashlib.sha256(text).hexdigest() for text in (b"1", b"2"))
    assert files.sha256_file(tmp_path / "a/sub/a.txt") == one
    listing = f"b.txt\0{two}\nsub/a.txt\0{one}\n".encode()
    assert base == hashlib.sha256(listing).hexdigest()
    with pytest.raises(NotADirectoryError):
        files.sha256_folder(tmp_path / "absent")
