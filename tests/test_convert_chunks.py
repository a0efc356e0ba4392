"""How a checkpoint's leaves lie on the disk: as from-hf writes them, and as others did."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import assert_same_bits, tiny_model
from jax.sharding import AxisType
from reference_models import SMALL, make_hf, read_folder

from convert import load_hf
from convert.from_hf import from_hf
from convert.mapping import transpose_into
from convert.raw import beside, block_buffer, blocks, in_order, mapped, transposed_block
from convert.to_hf import to_hf
from convert.verify import verify
from convert.weights import open_checkpoint
from memphis_jax.checkpoint import open_manager, restore_model, save
from memphis_jax.model import flatten

WHOLE = {"qk_layernorm": True, "use_qkv_bias": True, "num_key_value_heads": 2}


def test_a_layer_is_a_chunk_and_any_mesh_restores_the_bits(tmp_path):
    make_hf(tmp_path / "hf", "bfloat16", **WHOLE)
    from_hf(tmp_path / "hf", tmp_path / "ckpt")
    params = tmp_path / "ckpt" / "checkpoints" / "0" / "params"
    layers = SMALL["num_hidden_layers"]
    chunks = [path.name for path in (params / "layers/mlp/up_proj/kernel").glob("[0-9]*")]
    assert sorted(chunks) == [f"{layer}.0.0" for layer in range(layers)]
    expected = flatten(load_hf(tmp_path / "hf", "bfloat16"))
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3)
    for where in (None, mesh):
        restored, _ = restore_model(tmp_path / "ckpt", "bfloat16", where)
        assert_same_bits(
            *({n: np.asarray(a) for n, a in x.items()} for x in (flatten(restored), expected))
        )


@pytest.mark.parametrize("ocdbt", [True, False])
@pytest.mark.parametrize("compressed", [True, False])
def test_checkpoints_of_every_kind_are_exported(ocdbt, compressed, tmp_path):
    """Whole leaves in OCDBT, uncompressed, is what earlier versions of from-hf wrote."""
    make_hf(tmp_path / "hf", "bfloat16", **WHOLE)
    from_hf(tmp_path / "hf", tmp_path / "ckpt")
    arrays = {n: np.asarray(a) for n, a in flatten(load_hf(tmp_path / "hf", "bfloat16")).items()}
    params = tmp_path / "ckpt" / "checkpoints" / "0" / "params"
    shutil.rmtree(params)
    with ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_compression=compressed)
    ) as checkpointer:
        checkpointer.save(params, arrays)
    to_hf(tmp_path / "ckpt", tmp_path / "back")
    assert_same_bits(read_folder(tmp_path / "back"), read_folder(tmp_path / "hf"))
    assert verify(tmp_path / "back", tmp_path / "ckpt").differences == []


def test_matrices_of_several_blocks_and_a_rest(tmp_path):
    """Blocks of the transposition end amid a matrix, in both directions and at both widths."""
    rng = np.random.default_rng(0)
    for dtype in ("u2", "u4"):
        value = rng.integers(0, 2**16, (9001, 517), dtype)
        value.tofile(tmp_path / "file")
        matrix = mapped(tmp_path / "file", 0, value.shape, dtype)
        buffer = block_buffer(matrix)
        assert len(blocks(matrix)) > 2
        parts = [transposed_block(matrix, part, buffer).copy() for part in blocks(matrix)]
        np.testing.assert_array_equal(np.concatenate(parts), value.T)
    with pytest.raises(OSError, match="ends before byte"):
        mapped(tmp_path / "file", 8, value.shape, dtype)


def test_a_matrix_of_any_strides_is_transposed():
    value = np.arange(8 * 12, dtype=np.uint16).reshape(8, 12)
    for view in (value, value.T, value[:, ::3]):
        out = np.empty(view.shape[::-1], np.uint16)
        transpose_into(out, view)
        np.testing.assert_array_equal(out, view.T)


def test_jobs_under_way_cost_at_most_the_limit():
    """One above it runs alone; a result is under way until the next is asked for."""
    taken, taken_before = [], []

    class Pool(ThreadPoolExecutor):
        def submit(self, *args):
            taken_before.append(len(taken))
            return super().submit(*args)

    jobs = [(cost, lambda cost=cost: cost) for cost in (1, 1, 5, 1, 1, 2)]
    with Pool(2) as pool:
        for result in in_order(pool, jobs, limit=2):
            taken.append(result)
    assert taken == [1, 1, 5, 1, 1, 2]
    assert taken_before == [0, 0, 2, 3, 3, 5]


def test_what_an_error_finds_not_begun_never_begins():
    begun, started, cancelled = [], Event(), Event()

    def first():
        begun.append("first")
        started.set()
        cancelled.wait(timeout=5)

    with pytest.raises(ValueError), beside() as pool:
        pool.submit(first)
        second = pool.submit(begun.append, "second")
        second.add_done_callback(lambda _: cancelled.set())
        started.wait(timeout=30)
        raise ValueError
    assert second.cancelled() and begun == ["first"]


def test_a_training_saves_a_layer_of_a_kernel_in_a_chunk(tmp_path):
    """So an export reads, and holds, one layer at a time."""
    model = tiny_model()
    with open_manager(tmp_path, keep=1) as manager:
        save(manager, 1, model, {})
    saved = open_checkpoint(tmp_path)
    for name, leaf in flatten(model).items():
        chunk = saved.open(name).chunk_layout.read_chunk.shape
        assert chunk == ((1, *leaf.shape[1:]) if leaf.ndim > 2 else leaf.shape), name
