"""Kernels of attention: equal to XLA's, refused where they cannot be, compiled for a TPU."""

import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from memphis_jax.attention import (
    _has_cudnn,
    cudnn_attention,
    pick_attention,
    segment_runs,
    splash_attention,
)
from memphis_jax.config import ConfigError
from memphis_jax.layers import causal_attention
from memphis_jax.parallel import make_ops
from memphis_jax.plan_chips import parse_slice, slice_devices
from tests.helpers import assert_close

LENGTH = 256


def cpu_mesh(data: int = 1, fsdp: int = 1, model: int = 1) -> Mesh:
    return mesh_of(jax.devices("cpu"), data, fsdp, model)


def mesh_of(devices: Any, data: int, fsdp: int, model: int) -> Mesh:
    grid = np.array(devices)[: data * fsdp * model].reshape(data, fsdp, model)
    return Mesh(grid, ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3)


def packed_ids(rows: int) -> jax.Array:
    """Segments of unequal length that cross blocks of 128, padding at the end, one row full."""
    lengths = [[70, 1, 131, 40], [256], [128, 100], [3, 200, 53]]
    ids = np.zeros((rows, LENGTH), np.int32)
    for row in range(rows):
        start = 0
        for segment, length in enumerate(lengths[row % 4], start=1):
            ids[row, start : start + length] = segment
            start += length
    return jnp.asarray(ids)


def random_qkv(rows: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {"q": heads, "k": kv_heads, "v": kv_heads}
    return {
        name: jnp.asarray(rng.standard_normal((rows, LENGTH, count, head_dim), "float32"))
        for name, count in shapes.items()
    }


def output_and_gradients(attention: Any, qkv: dict[str, jax.Array], ids: Any) -> Any:
    """A loss that leaves out padding, as training does."""

    def loss(qkv: dict[str, jax.Array]) -> Any:
        out = attention(qkv["q"], qkv["k"], qkv["v"], ids)
        if ids is not None:
            out = jnp.where((ids > 0)[..., None, None], out, 0.0)
        return jnp.sin(out).sum(), out

    gradients, out = jax.jit(jax.grad(loss, has_aux=True))(qkv)
    return {"out": out, **gradients}


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array, ids: Any) -> jax.Array:
    """The formula on whole scores [B, N, T, S], differentiated by JAX."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[3])
    mask = jnp.tri(LENGTH, dtype=bool)[None]
    if ids is not None:
        mask = mask & (ids[:, :, None] == ids[:, None, :])
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf))
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


@pytest.mark.parametrize(("kv_heads", "packed"), [(4, True), (2, True), (1, False)])
def test_xla_kernel_equals_the_formula(kv_heads: int, packed: bool) -> None:
    """Output and gradients, over two chunks of queries, also rematerialised."""
    qkv, ids = random_qkv(2, 4, kv_heads, 24), packed_ids(2) if packed else None
    expected = output_and_gradients(plain_attention, qkv, ids)
    assert_close(output_and_gradients(causal_attention, qkv, ids), expected)
    policy = jax.checkpoint_policies.save_only_these_names("attention")
    kept = jax.checkpoint(causal_attention, policy=policy)
    assert_close(output_and_gradients(kept, qkv, ids), expected)


@pytest.mark.parametrize(
    ("kv_heads", "packed", "mesh"),
    [(4, True, (1, 1, 1)), (2, True, (1, 1, 1)), (4, False, (1, 1, 1)), (2, True, (2, 2, 2))],
)
@pytest.mark.slow
def test_splash_equals_xla(kv_heads: int, packed: bool, mesh: tuple[int, int, int]) -> None:
    """Output and gradients, head_dim 80, kv-heads shared or not, one device or eight."""
    qkv = random_qkv(4 if mesh[0] > 1 else 2, 4, kv_heads, 80)
    ids = packed_ids(qkv["q"].shape[0]) if packed else None
    splash = splash_attention(cpu_mesh(*mesh), 4, LENGTH, interpret=True)
    expected = output_and_gradients(causal_attention, qkv, ids)
    assert_close(output_and_gradients(splash, qkv, ids), expected)


@pytest.mark.slow
def test_splash_under_remat_equals_xla() -> None:
    """Also where a policy keeps the kernel's own residuals, and made while a step is traced."""
    qkv, ids = random_qkv(2, 4, 4, 16), packed_ids(2)

    def attend(*args: Any) -> jax.Array:
        splash = splash_attention(cpu_mesh(), 4, LENGTH, interpret=True)
        policy = jax.checkpoint_policies.save_only_these_names("attention")
        return jax.checkpoint(splash, policy=policy)(*args)

    expected = output_and_gradients(causal_attention, qkv, ids)
    assert_close(output_and_gradients(attend, qkv, ids), expected)


SHAPE = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 80, "seq_len": 256}


def test_auto_follows_the_platform_and_what_the_kernel_can_do() -> None:
    """A step for a TPU gets splash on any machine; rows that splash cannot tile get XLA."""
    mesh = cpu_mesh()
    assert pick_attention("auto", "cpu", mesh, **SHAPE) is causal_attention
    assert pick_attention("auto", "tpu", mesh, **SHAPE) is not causal_attention
    assert pick_attention("auto", "tpu", mesh, **SHAPE | {"seq_len": 200}) is causal_attention
    assert pick_attention("auto", "gpu", mesh, **SHAPE, dtype="float32") is causal_attention
    assert pick_attention("xla", "tpu", mesh, **SHAPE) is causal_attention


@pytest.mark.parametrize(
    ("name", "platform", "change", "message"),
    [
        ("flash", "tpu", {}, "'flash' is not one of 'auto', 'xla', 'splash', 'cudnn'"),
        ("splash", "gpu", {}, "needs a TPU, this step is for gpu; use 'auto'"),
        ("cudnn", "tpu", {}, "needs a GPU, this step is for tpu; use 'auto'"),
        ("splash", "tpu", {"seq_len": 200}, "seq_len = 200 is not a multiple of 128; round it up"),
        ("splash", "tpu", {"num_kv_heads": 1}, "num_key_value_heads = 1 is not divisible by "),
        ("splash", "tpu", {"num_heads": 9}, "num_attention_heads = 9 is not divisible by "),
        ("cudnn", "rocm", {}, "JAX finds no cuDNN here; pip install"),
    ],
)
def test_a_kernel_that_cannot_raises(
    name: str, platform: str, change: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pick_attention(name, platform, cpu_mesh(model=2), **SHAPE | change)


@pytest.mark.skipif(_has_cudnn(), reason="JAX has cuDNN here")
def test_a_gpu_without_cudnn_takes_xla_or_is_told() -> None:
    mesh = cpu_mesh()
    assert pick_attention("auto", "gpu", mesh, **SHAPE) is causal_attention
    with pytest.raises(ConfigError, match="JAX finds no cuDNN here"):
        pick_attention("cudnn", "cuda", mesh, **SHAPE)


@pytest.mark.slow
def test_splash_does_not_compile_for_an_old_tpu() -> None:
    chip = SimpleNamespace(device_kind="TPU v3", platform="tpu")
    mesh: Any = SimpleNamespace(devices=np.array([chip]), shape={"model": 1})
    assert pick_attention("auto", "tpu", mesh, **SHAPE) is causal_attention
    with pytest.raises(ConfigError, match="does not compile for TPU v3; use a v4"):
        pick_attention("splash", "tpu", mesh, **SHAPE)


@pytest.mark.parametrize(
    ("change", "told"),
    [({"seq": 200}, "seq_len = 200 is"), ({"kv": 3}, "key_value_heads = 3"), ({"q": 7}, "ads = 7")],
)
def test_the_kernel_is_picked_by_the_arrays_that_come(change: dict[str, int], told: str) -> None:
    sizes = {"seq": 256, "q": 8, "kv": 4} | change
    ops = make_ops(mesh_of(slice_devices(parse_slice("v5e:2x2")), 1, 2, 2), "splash")
    q, k = (jax.ShapeDtypeStruct((2, sizes["seq"], sizes[n], 80), "float32") for n in ("q", "kv"))
    with pytest.raises(ConfigError, match=told):
        jax.eval_shape(ops.attention, q, k, k, None)


@pytest.mark.parametrize(
    ("policy", "forward_kernels"), [(None, 2), ("attention", 1)], ids=["full", "attention"]
)
@pytest.mark.slow
def test_splash_compiles_for_a_v5e(policy: str | None, forward_kernels: int) -> None:
    """head_dim 80 unpadded, 4096 positions, under remat, by the TPU's compiler: its VMEM suffices.

    Where a policy keeps what bears the name "attention", the forward kernel runs once.
    """
    mesh = mesh_of(slice_devices(parse_slice("v5e:2x2")), 1, 2, 2)
    shape = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 80, "seq_len": 4096}
    attention = pick_attention("auto", "tpu", mesh, **shape)
    assert attention is not causal_attention
    names = jax.checkpoint_policies.save_only_these_names("attention")
    kept = jax.checkpoint(attention, policy=names if policy else None)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
        # The output is needed backward too, as o_proj needs it.
        return jnp.square(kept(2 * q, k, v, ids).astype(jnp.float32)).sum()

    def array(dtype: Any, *dims: int) -> jax.ShapeDtypeStruct:
        spec = P("fsdp", None, "model") if len(dims) == 4 else P("fsdp")
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

    q, k = (array(jnp.bfloat16, 2, 4096, heads, 80) for heads in (4, 2))
    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    with jax.default_matmul_precision("default"):  # what training has; conftest sets the highest
        traced = step.trace(q, k, k, array(jnp.int32, 2, 4096))
        program = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    kernels = [line for line in program.splitlines() if '"tpu_custom_call"' in line]
    forward = [one for one in kernels if "splash_mha_fwd" in one]
    assert len(forward) == forward_kernels
    assert len(kernels) == forward_kernels + 2  # dq; dk and dv


def test_segment_runs_by_hand() -> None:
    """Padding is a run, an id that comes again another one; a last start says that more follow."""
    ids = jnp.asarray([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1], [1, 2, 1, 2, 2, 0]], jnp.int32)
    starts, lengths = segment_runs(ids, 3)
    assert starts.tolist() == [[0, 2, 5, -1], [0, -1, -1, -1], [0, 1, 2, 3]]
    assert lengths.tolist() == [[2, 3, 1], [6, -1, -1], [1, 1, 1]]


@pytest.mark.parametrize(("capability", "sizes"), [("8.0", []), ("9.0", [2, 16])])
def test_cudnn_program_has_both_sizes_and_the_bias(
    capability: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lowered for CUDA here, where there is none: what jax's own functions are asked for."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_200)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda least: capability >= least)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)
    attention = cudnn_attention(cpu_mesh(), capability)
    qkv = [jax.ShapeDtypeStruct((2, LENGTH, 4, 80), jnp.bfloat16)] * 3

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, packed_ids(2)).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*qkv)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @__cudnn\$fmha(\w+)\(.*?max_seg_per_batch\\22: (\d+)", text)
    packed = [(name, size) for size in sizes for name in ("Softmax", "SoftmaxBackward")]
    biased = [("ScaleBiasSoftmax", 1), ("ScaleBiasSoftmaxBackward", 1)]
    assert sorted((name, int(size)) for name, size in calls) == sorted(packed + biased)
