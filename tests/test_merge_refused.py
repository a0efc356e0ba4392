"""What cannot be merged, each with one line that says why."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from merged import HALF, MODEL, certify, folder, read, tensors

from memphis_jax.config import ConfigError, MergeConfig
from memphis_jax.interpolate import interpolate
from memphis_jax.merge import merge, merge_folders
from memphis_jax.rounds.certificate import check_certificate, file_hashes
from memphis_jax.tensors import open_tensors


def refused(a: Path, b: Path, out: Path, how: MergeConfig = HALF, **options: Any) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        merge_folders(a, b, out, how, **options)
    assert not list(out.parent.glob(".*.partial"))
    told = str(caught.value)
    assert len(told.splitlines()) == 1
    return told


def test_another_structure_is_refused_with_the_whole_list(tmp_path: Path) -> None:
    x, y = tensors(1), tensors(2)
    y["model.norm.bias"] = y["model.norm.bias"].astype(np.float16)
    y["model.layers.0.mlp.up_proj.weight"] = y["model.layers.0.mlp.up_proj.weight"].T.copy()
    del y["model.norm.weight"]
    y["model.extra"] = y["model.norm.bias"]
    a, b = folder(tmp_path / "a", x), folder(tmp_path / "b", y, vocab_size=62, rope_theta=5.0)
    tokenizer = json.loads((b / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {"a": 0, "c": 1}
    (b / "tokenizer.json").write_text(json.dumps(tokenizer))
    certify(b)
    told = refused(a, b, tmp_path / "c")
    for problem in (
        "config vocab_size: 61 -> 62",
        "config rope_theta: 10000.0 -> 5.0",
        "the tokenizers' vocabularies differ in 2 entries",
        f"model.norm.weight is only in {a}",
        f"model.extra is only in {b}",
        "model.norm.bias: dtype F32 and F16",
        "model.layers.0.mlp.up_proj.weight: shape [24, 16] and [16, 24]",
    ):
        assert problem in told
    assert not (tmp_path / "c").exists()


def test_a_changed_file_is_named_and_refused(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", tensors(1)), folder(tmp_path / "b", tensors(2))
    (b / "config.json").write_text(json.dumps(MODEL | {"bos_token_id": 0}))
    (a / "conversion.json").unlink()
    told = refused(a, b, tmp_path / "c")
    assert f"{a} has no conversion.json" in told
    assert f"{b / 'conversion.json'} does not match its folder: config.json is not what" in told
    merge_folders(a, b, tmp_path / "c", HALF, uncertified=True)
    check_certificate(tmp_path / "c", file_hashes(tmp_path / "c"))


def test_nan_is_refused_by_name(tmp_path: Path) -> None:
    y = tensors(2)
    y["model.norm.bias"][3] = np.nan
    a, b = folder(tmp_path / "a", tensors(1)), folder(tmp_path / "b", y)
    assert "model.norm.bias of" in refused(a, b, tmp_path / "c")


def test_a_result_that_float16_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    """SLERP of nearly opposite tensors is larger than both, times 1 / sin of a small angle."""
    x, y = tensors(1, np.float16), tensors(2, np.float16)
    x["model.norm.weight"] = np.linspace(30_000, 60_000, 16).astype(np.float16)
    y["model.norm.weight"] = -x["model.norm.weight"][::-1]
    a, b = folder(tmp_path / "a", x), folder(tmp_path / "b", y)
    told = refused(a, b, tmp_path / "c", MergeConfig(t=0.25))
    assert "model.norm.weight: the result is too large for F16" in told
    merge_folders(a, b, tmp_path / "c", MergeConfig(t=0.25, method="linear"))


def test_files_that_are_no_json_objects_are_named(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", tensors(1)), folder(tmp_path / "b", tensors(2))
    told = {"{": "is not JSON", "[]": "holds a list, a JSON object is needed"}
    for name in ("tokenizer.json", "config.json"):
        good = (a / name).read_text()
        for text, problem in told.items():
            (a / name).write_text(text)
            assert f"{a / name} {problem}" in refused(a, b, tmp_path / "c", uncertified=True)
        (a / name).write_text(good)
    for text in ("{", "[]", "{}"):  # not asked to vouch for anything
        (a / "conversion.json").write_text(text)
        merge_folders(a, b, tmp_path / "c", HALF, uncertified=True)
        merged = json.loads((tmp_path / "c" / "conversion.json").read_text())
        assert merged["source"]["merged_from"][0]["source"] is None


def test_what_out_may_be(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", tensors(1)), folder(tmp_path / "b", tensors(2))
    for out in (a, b, a / "inside", tmp_path):
        before = file_hashes(a)
        assert "overlap" in refused(a, b, out)
        assert file_hashes(a) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    assert "holds something else" in refused(a, b, other)
    merge_folders(a, b, tmp_path / "c", HALF)
    merge_folders(a, b, tmp_path / "c", MergeConfig(t=1.0))  # an earlier merge is replaced
    assert (
        read(tmp_path / "c")["model.norm.bias"].tolist() == tensors(2)["model.norm.bias"].tolist()
    )
    (tmp_path / "c" / "notes.md").write_text("what I saw")
    assert "notes.md with it, which conversion.json there" in refused(a, b, tmp_path / "c")


def test_damaged_and_absent_files_are_named(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", tensors(1), 2)
    shard = a / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"{shard.name} .* is damaged"):
        open_tensors(a)
    shutil.copyfile(a / "model-00002-of-00002.safetensors", shard)
    with pytest.raises(ValueError, match=r"is in model-00001.* and model-00002"):
        open_tensors(a)
    shard.unlink()
    weight_map = {"x": shard.name}
    (a / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=f"{shard.name} is named in .* and is absent"):
        open_tensors(a)
    (a / "model.safetensors.index.json").write_text('{"weight_map": {"x": ["y"]}}')
    with pytest.raises(ValueError, match="is not an index of shards"):
        open_tensors(a)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"t": 1.5}, "t = 1.5 must be between 0 and 1"),
        ({"t": math.nan}, "t = nan must be between"),
        ({"method": "ties"}, "'ties' is not one of 'slerp', 'linear'"),
        ({"threshold": 0.0}, "threshold = 0.0"),
        ({"t_for": ("mlp",)}, "'mlp' is not REGEX=T"),
        ({"t_for": ("mlp=2",)}, "'mlp=2' is not REGEX=T with T in 0..1"),
        ({"t_for": ("(=0.5",)}, "is not REGEX=T"),
        ({"sweep": (0.0, -1.0)}, "sweep: t = -1.0"),
    ],
)
def test_values_that_no_merge_has(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MergeConfig(**values)
    assert problem in str(caught.value)


def test_a_pattern_that_no_tensor_has_is_refused(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", tensors(1)), folder(tmp_path / "b", tensors(2))
    told = refused(a, b, tmp_path / "c", MergeConfig(t_for=("self_attn=0.1", "atn=0.3")))
    assert "no tensor's name holds 'atn'" in told


def test_the_command_alone_is_slerp_half_way_and_makes_the_folders(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", tensors(1)), folder(tmp_path / "b", tensors(2))
    merge([str(a), str(b), "--out", str(tmp_path / "new" / "c")])
    name = "model.norm.weight"
    wanted = interpolate(tensors(1)[name], tensors(2)[name], 0.5)
    np.testing.assert_allclose(read(tmp_path / "new" / "c")[name], wanted, rtol=1e-6)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", tensors(1))
    assert refused(a, tmp_path / "b", tmp_path / "c") == f"{tmp_path / 'b'} is not a folder"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--sweep", "0,1", "--task", "x=x.jsonl"], "--sweep needs --config"),
        (["--sweep", "0,1", "--config", "x.py"], "--sweep needs --config, and --task"),
        (["--config", "x.py"], "no use of --config"),
        (["--task", "x=x.jsonl"], "no use of --config, --task"),
        (["--eval", "gsm8k"], "no use of --config, --task, --eval"),
        (["--config.seed=1"], "no use of --config, --task, --eval"),
        (["--max-shard-mb", "0"], "--max-shard-mb 0 must be 1 or more"),
    ],
)
def test_options_that_do_not_go_together(
    options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        merge(["a", "b", "--out", "c", *options])
    assert told in " ".join(capsys.readouterr().err.split())


def test_a_merge_that_a_kill_left_aside_is_put_back(tmp_path: Path) -> None:
    """Killed between the two renames, then refused: the earlier merge is still there."""
    a, b = folder(tmp_path / "a", tensors(1)), folder(tmp_path / "b", tensors(2))
    merge_folders(a, b, tmp_path / "c", HALF)
    before = file_hashes(tmp_path / "c")
    (tmp_path / "c").rename(tmp_path / ".c.old")
    broken = tensors(3)
    broken["model.norm.bias"][3] = np.nan
    refused(a, folder(tmp_path / "d", broken), tmp_path / "c")
    assert file_hashes(tmp_path / "c") == before
