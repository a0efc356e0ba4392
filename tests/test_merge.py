"""Merging: closed forms, mergekit's numbers, shards on either side, certificates."""

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import GOLDEN
from merged import HALF, SHAPES, folder, read, tensors

from memphis_jax.config import MergeConfig
from memphis_jax.interpolate import Sums, interpolate, sums, weights
from memphis_jax.merge import merge, merge_folders
from memphis_jax.rounds.certificate import check_certificate, file_hashes
from memphis_jax.rounds.files import sha256_file
from memphis_jax.tensors import from_float64, to_float64

# --- the arithmetic


@pytest.mark.parametrize("t", [0.1, 0.25, 0.5, 0.9])
def test_slerp_is_mergekits(t: float) -> None:
    """In mergekit's float64 to 1e-12, and in the float32 that it uses by default to 1e-6.

    At 178 degrees its float32 loses four digits, since acos is steep there.
    """
    golden = np.load(GOLDEN / "slerp.npz")
    names = sorted({key.split("/")[0] for key in golden.files})
    assert len(names) == 21 and "angle-1.7-2d" in names and "angle-1.9-2d" in names
    for name in names:
        a, b, exact, single = (
            golden[f"{name}/{k}"] for k in ("a", "b", f"{t}/float64", f"{t}/float32")
        )
        ours, size = interpolate(a, b, t), max(1, np.abs(exact).max())
        assert np.abs(ours - exact).max() <= 1e-12 * size, name
        assert name == "angle-178.0-2d" or np.abs(ours - single).max() <= 1e-6 * size, name


@pytest.mark.parametrize(
    ("degrees", "branch", "why"),
    [
        (1.7, "linear", "parallel"),
        (1.9, "slerp", ""),
        (178.1, "slerp", ""),
        (178.3, "linear", "antiparallel"),
    ],
)
def test_the_linear_branch_begins_at_mergekits_threshold(
    degrees: float, branch: str, why: str
) -> None:
    a, b = (
        np.array([1.0, 0.0]),
        np.array([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]),
    )
    found = weights("slerp", 0.5, sums(a, b))
    assert (found.branch, found.why) == (branch, why)
    assert weights("slerp", 0.5, sums(a, b), threshold=1.0).branch == "slerp"


def test_closed_forms() -> None:
    a, b = np.array([3.0, 0.0, -0.0]), np.array([0.0, 4.0, 1e-300])
    assert interpolate(a, b, 0.0).tobytes() == a.tobytes()
    assert interpolate(a, b, 1.0).tobytes() == b.tobytes()
    # orthogonal: each side by the sine of its share of the quarter turn
    third = interpolate(a, b, 1 / 3)
    np.testing.assert_allclose(third[:2], [3 * math.sqrt(3) / 2, 4 / 2], rtol=1e-15)
    # a quarter of the way from 0 to 60 degrees is 15 degrees, on the unit circle
    unit = np.array([0.5, math.sqrt(3) / 2])
    quarter = interpolate(np.array([1.0, 0.0]), unit, 0.25)
    np.testing.assert_allclose(
        quarter, [math.cos(math.pi / 12), math.sin(math.pi / 12)], rtol=1e-15
    )
    # antiparallel: no arc is the shorter one, so it is linear, through 0
    assert interpolate(a, -a, 0.5).tolist() == [0.0, 0.0, 0.0]
    assert interpolate(a, -2 * a, 0.25)[0] == 0.75 * 3 - 0.25 * 6
    # equal
    assert interpolate(a, a, 0.5).tolist() == a.tolist()
    # norm 0: orthogonal to everything, as in mergekit
    np.testing.assert_allclose(interpolate(0 * b, b, 0.5)[1], 4 * math.sqrt(0.5), rtol=1e-15)
    assert interpolate(0 * b, 0 * b, 0.5).tolist() == [0.0, 0.0, 0.0]
    # linear
    assert interpolate(a, b, 0.25, "linear")[:2].tolist() == [2.25, 1.0]


@pytest.mark.parametrize(
    ("total", "branch", "why"),
    [
        (Sums(0.0, 4.0, 0.0), "slerp", "norm 0, taken as orthogonal"),
        (Sums(4.0, 0.0, 0.0), "slerp", "norm 0, taken as orthogonal"),
        (Sums(0.81e-16, 1.0, 0.9e-8), "slerp", "norm 0, taken as orthogonal"),  # norm 0.9e-8
        (Sums(1.44e-16, 1.0, 1.2e-8), "linear", "parallel"),  # 1.2e-8 has a direction
        (Sums(1.0, 4.0, 2.0), "linear", "parallel"),  # an angle of 0 has no arc
        (Sums(1.0, 4.0, -2.0), "linear", "antiparallel"),
    ],
)
def test_tensors_without_a_direction_or_an_angle(total: Sums, branch: str, why: str) -> None:
    by = weights("slerp", 0.5, total, threshold=1.0)
    assert (by.branch, by.why) == (branch, why)


def test_equal_tensors_stay_to_the_bit_in_every_dtype() -> None:
    for dtype, code in ((np.float32, "F32"), (np.float16, "F16"), (ml_dtypes.bfloat16, "BF16")):
        a = np.random.default_rng(1).standard_normal(1000).astype(dtype)
        for t in (0.1, 0.3, 0.7):
            same = from_float64(interpolate(to_float64(a), to_float64(a), t), code)
            assert same.tobytes() == a.tobytes()


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    finite = bits[np.isfinite(bits.astype(np.float32))]
    assert from_float64(to_float64(finite), "BF16").tobytes() == finite.tobytes()
    x = np.random.default_rng(2).standard_normal(10_000)
    ties = (to_float64(finite)[:-1] + to_float64(finite)[1:]) / 2  # of neighbours
    for values in (x, ties):
        expected = values.astype(np.float32).astype(ml_dtypes.bfloat16)
        assert from_float64(values, "BF16").tobytes() == expected.tobytes()


# --- folders


@pytest.mark.parametrize(("left", "right", "out_mb"), [(1, 1, 5000), (2, 3, 5000), (3, 1, 1)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_any_number_of_shards(
    tmp_path: Path, dtype: Any, left: int, right: int, out_mb: int
) -> None:
    x, y = tensors(1, dtype), tensors(2, dtype)
    if out_mb == 1:  # a tensor of more than a shard, and of more than one piece
        big = np.random.default_rng(3).standard_normal((2, 1100, 1100)).astype(dtype)
        x["big"], y["big"] = big
    a, b = folder(tmp_path / "a", x, left), folder(tmp_path / "b", y, right)
    merge_folders(a, b, tmp_path / "c", HALF, shard_bytes=out_mb * 10**6)
    merged = read(tmp_path / "c")
    assert merged.keys() == x.keys()
    for name, value in merged.items():
        wanted = interpolate(to_float64(x[name]), to_float64(y[name]), 0.5)
        assert value.dtype == dtype
        spacing = np.abs(np.spacing(wanted.astype(np.float32).astype(dtype)).astype(np.float64))
        assert (np.abs(to_float64(value) - wanted) <= spacing).all(), name
    shards = sorted(path.name for path in (tmp_path / "c").glob("*.safetensors"))
    assert (len(shards) > 1) == (out_mb == 1)
    if len(shards) > 1:
        index = json.loads((tmp_path / "c" / "model.safetensors.index.json").read_text())
        assert {*index["weight_map"].values()} == {*shards}


def test_a_tensors_own_t_and_the_report(tmp_path: Path) -> None:
    x, y = tensors(1), tensors(2)
    y["model.norm.weight"] = 1.001 * x["model.norm.weight"]
    y["model.norm.bias"] = -x["model.norm.bias"]
    a, b = folder(tmp_path / "a", x), folder(tmp_path / "b", y)
    options = ["--t-for", "mlp=0", "--t-for", "mlp|embed=1", "--t", "0.25"]
    merge([str(a), str(b), "--out", str(tmp_path / "c"), *options])
    merged = read(tmp_path / "c")
    up, embed, q = list(SHAPES)[1], next(iter(SHAPES)), list(SHAPES)[2]
    assert merged[up].tobytes() == x[up].tobytes()
    assert merged[embed].tobytes() == y[embed].tobytes()
    np.testing.assert_allclose(merged[q], interpolate(x[q], y[q], 0.25), rtol=1e-6)
    report = json.loads((tmp_path / "c" / "merge.json").read_text())
    rows = report["tensors"]
    assert [rows[name]["t"] for name in (up, embed, q)] == [0.0, 1.0, 0.25]
    assert [rows[name]["branch"] for name in (up, embed, q)] == ["copy", "copy", "slerp"]
    assert rows["model.norm.weight"]["why"] == "parallel"
    assert rows["model.norm.bias"]["why"] == "antiparallel"
    assert rows["model.norm.bias"]["angle"] == 180.0
    assert report["linear_because"] == {
        "antiparallel": {"tensors": 1, "elements": 16},
        "parallel": {"tensors": 1, "elements": 16},
    }
    assert report["branches"]["copy"] == {"tensors": 2, "elements": 61 * 16 + 24 * 16}
    flat = {name: (x[name].ravel().astype(np.float64), y[name].ravel()) for name in SHAPES}
    for name, (left, right) in flat.items():
        row = rows[name]
        assert row["norm_a"] == pytest.approx(np.linalg.norm(left), rel=1e-6)
        assert row["norm_b"] == pytest.approx(np.linalg.norm(right), rel=1e-6)
        assert row["norm"] == pytest.approx(np.linalg.norm(merged[name]), rel=1e-5, abs=1e-6)
        assert row["distance"] == pytest.approx(np.linalg.norm(right - left), rel=1e-6)
        cos = left @ right / np.linalg.norm(left) / np.linalg.norm(right)
        assert row["angle"] == pytest.approx(
            math.degrees(math.acos(max(-1, min(1, cos)))), abs=0.05
        )


def test_the_certificate_covers_the_merge_and_names_both_parents(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", tensors(1)), folder(tmp_path / "b", tensors(2), 2)
    merge_folders(a, b, tmp_path / "c", HALF)
    assert [path.name for path in (tmp_path / "c").glob("*.safetensors")] == ["model.safetensors"]
    check_certificate(tmp_path / "c", file_hashes(tmp_path / "c"))
    certificate = json.loads((tmp_path / "c" / "conversion.json").read_text())
    parents = certificate["source"]["merged_from"]
    assert [parent["folder"] for parent in parents] == [str(a), str(b)]
    assert [parent["files"] for parent in parents] == [file_hashes(a), file_hashes(b)]
    assert parents[1]["source"]["checkpoint"] == "/runs/b"
    assert parents[1]["certificate_sha256"] == sha256_file(b / "conversion.json")
    assert certificate["source"]["step"] == 0  # no training step has followed
    # a merge of a merge carries the whole descent
    merge_folders(tmp_path / "c", b, tmp_path / "d", HALF)
    descent = json.loads((tmp_path / "d" / "conversion.json").read_text())["source"]["merged_from"]
    assert descent[0]["source"]["merged_from"] == parents


@pytest.mark.slow
def test_a_real_export_comes_back_from_a_merge(tmp_path: Path) -> None:
    """t = 0 of a checkpoint's export is that export, for our model and for transformers."""
    from sampled import save_checkpoint, small_model

    from convert.from_hf import load_hf
    from convert.to_hf import to_hf

    for seed in (0, 1):
        save_checkpoint(tmp_path / f"ckpt{seed}", small_model(seed))
        to_hf(tmp_path / f"ckpt{seed}", tmp_path / f"hf{seed}")
    merge_folders(tmp_path / "hf0", tmp_path / "hf1", tmp_path / "c", MergeConfig(t=0.0))
    before, after = read(tmp_path / "hf0"), read(tmp_path / "c")
    assert {n: v.tobytes() for n, v in before.items()} == {n: v.tobytes() for n, v in after.items()}
    load_hf(tmp_path / "c")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert AutoTokenizer.from_pretrained(tmp_path / "c").eos_token == "<|endoftext|>"
