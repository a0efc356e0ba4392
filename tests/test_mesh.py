"""The mesh: which rows each host loads, slices, and sizes that do not fit."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from helpers import TINY
from jax.sharding import Mesh
from meshes import SETTINGS, SIZES, batch, mesh_of

from memphis_jax import sharding
from memphis_jax.config import ConfigError, MeshConfig, ModelConfig, check_mesh

# --- batches of several hosts


def fake_mesh(shape: tuple[int, int, int], processes: list[int]) -> Any:
    """Devices that only know their process, in the order of the mesh."""
    devices = np.array([SimpleNamespace(process_index=p) for p in processes], dtype=object)
    names = dict(zip(sharding.AXES, shape, strict=True))
    return SimpleNamespace(devices=devices.reshape(shape), shape=names)


@pytest.mark.parametrize(
    ("shape", "processes", "shards", "shares"),
    [
        ((1, 4, 1), [0, 0, 1, 1], [[0, 1], [2, 3]], [(0, 2), (1, 2)]),
        # A torus may give a host's devices places that do not follow each other.
        ((1, 4, 1), [0, 1, 0, 1], [[0, 2], [1, 3]], [(0, 2), (1, 2)]),
        ((2, 1, 2), [0, 0, 1, 1], [[0], [1]], [(0, 2), (1, 2)]),
        # `model` over hosts: both need the same rows.
        ((1, 1, 4), [0, 0, 1, 1], [[0], [0]], [(0, 1), (0, 1)]),
        (
            (2, 1, 4),
            [0, 0, 1, 1, 2, 2, 3, 3],
            [[0], [0], [1], [1]],
            [(0, 2), (0, 2), (1, 2), (1, 2)],
        ),
    ],
)
def test_rows_of_hosts(
    shape: tuple[int, int, int],
    processes: list[int],
    shards: list[list[int]],
    shares: list[tuple[int, int]],
) -> None:
    mesh = fake_mesh(shape, processes)
    assert sharding.row_shards(mesh) == shards
    assert [sharding.host_share(mesh, p) for p in range(len(shards))] == shares


def test_hosts_that_share_some_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="share rows of the batch unevenly"):
        sharding.row_shards(fake_mesh((1, 2, 3), [0, 0, 1, 1, 2, 2]))


def test_candidates_are_found_in_the_global_batch() -> None:
    """Rows of a permuted mesh: what a candidate points at stays its own."""
    devices = np.array(jax.devices())[[3, 1, 0, 2, 7, 5, 4, 6]].reshape(1, 8, 1)
    mesh = Mesh(devices, sharding.AXES)
    data = batch("rank")
    moved = sharding.global_batch(data, mesh, 0)
    for name, array in data.items():
        np.testing.assert_array_equal(moved[name], array)  # one process: nothing moves


def test_rows_that_do_not_divide_over_the_devices_are_refused() -> None:
    rows = {"tokens": np.zeros((1, 12, 4), np.int32)}
    with pytest.raises(ValueError, match=r"tokens \(1, 12, 4\) does not divide over 8 devices"):
        sharding.global_batch(rows, mesh_of((1, 8, 1)), 0)


# --- wrong sizes, told before anything is built


@pytest.mark.parametrize(
    ("sizes", "devices", "told"),
    [
        ((3, 1, 1), 8, "needs 3 devices, there are 8"),
        ((16, 1, 1), 8, "needs 16 devices, there are 8"),
        ((3, -1, 1), 8, "8 devices do not divide by 3"),
        ((-1, -1, 1), 8, "only one axis can take the rest"),
        ((0, 1, 1), 8, "data = 0 must be 1 or more"),
    ],
)
def test_a_mesh_that_does_not_fit(sizes: tuple[int, int, int], devices: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        MeshConfig(*sizes).sizes(devices)


@pytest.mark.parametrize(
    ("change", "mesh", "told"),
    [
        ({}, (16, 1, 1), r"sft: a micro-batch of 8 \(batch_size 16 / accumulation 2\).* = 16"),
        ({}, (1, 1, 16), "num_attention_heads = 8 is not divisible by mesh.model = 16"),
        ({"num_key_value_heads": 4}, (1, 1, 8), "num_key_value_heads = 4 is not divisible"),
        ({"intermediate_size": 50}, (1, 4, 1), "intermediate_size = 50 is not divisible"),
        ({"seq_len": 27}, (1, 1, 2), "sft.seq_len = 27 is not divisible by mesh.model = 2"),
        ({"max_position_embeddings": 16}, (1, 1, 1), "sft.seq_len = 24 exceeds the model's"),
    ],
)
def test_sizes_that_do_not_fit(
    change: dict[str, int], mesh: tuple[int, int, int], told: str
) -> None:
    settings = replace(SETTINGS, seq_len=change.pop("seq_len", 24))
    axes = dict(zip(sharding.AXES, mesh, strict=True))
    with pytest.raises(ConfigError, match=told):
        check_mesh(ModelConfig(**{**TINY, **SIZES, **change}), axes, {"sft": settings})


def test_slices_lie_along_data() -> None:
    devices = [SimpleNamespace(platform="tpu", slice_index=i // 2) for i in range(4)]
    with pytest.raises(ConfigError, match=r"mesh\.data = 1 is not a multiple of the 2 slices"):
        sharding.make_mesh(1, 4, 1, devices=devices)


@dataclass(frozen=True)
class Gpu:
    """A GPU has a slice_index too: its host's number."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "H100"


def test_only_tpus_have_slices_and_fsdp_takes_all_devices() -> None:
    mesh = sharding.make_mesh(devices=[Gpu(i, slice_index=i // 2) for i in range(4)])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "model": 1}
    assert [device.id for device in mesh.devices.flat] == [0, 1, 2, 3]


def test_rows_of_real_slices() -> None:
    """Two v5e slices of 16 chips, as the TPU runtime describes them to the compiler."""
    pytest.importorskip("libtpu", reason="libtpu describes TPU slices (the extra `dev` has it)")
    code = """
from jax.experimental import topologies
from memphis_jax import sharding
slices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4", num_slices=2)
mesh = sharding.make_mesh(2, -1, 1, devices=slices.devices)
assert [{d.slice_index for d in part.flat} for part in mesh.devices] == [{0}, {1}]
rows = sharding.row_shards(mesh)
assert sorted(sum(rows, [])) == list(range(32)) and {len(own) for own in rows} == {4}
assert any(own != list(range(own[0], own[0] + 4)) for own in rows)  # not side by side
assert sorted(sharding.host_share(mesh, p) for p in range(8)) == [(p, 8) for p in range(8)]
"""
    env = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
