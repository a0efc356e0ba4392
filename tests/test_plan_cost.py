"""FLOPs and bounds against numbers worked by hand."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from memphis_jax import train_step
from memphis_jax.attention import splash_attention
from memphis_jax.config import ComputeConfig, ConfigError, ModelConfig, OptimizerConfig, PhaseConfig
from memphis_jax.plan_chips import CHIPS, Slice, parse_slice, peak_flops
from memphis_jax.plan_compile import Request, abstract_batch
from memphis_jax.plan_cost import bounds, jaxpr_flops, matmul_parameters, model_flops


def flops_of(function: Any, *shapes: tuple[int, ...]) -> float:
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr)


def mesh_of(size: int) -> Mesh:
    grid = np.array(jax.devices()[:size]).reshape(1, size, 1)
    return Mesh(grid, ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3)


def test_products_and_loops() -> None:
    product = 2 * 3 * 5 * 7
    assert flops_of(lambda a, b: a @ b, (3, 5), (5, 7)) == product
    assert flops_of(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 3, 5), (4, 5, 7)) == (
        4 * product
    )

    def loop(x: jax.Array, w: jax.Array) -> jax.Array:  # w: a stack of 6
        body = jax.checkpoint(lambda c, layer: (c @ layer, None))
        return jax.lax.scan(body, x, w)[0].sum()

    layer = 2 * 3 * 5 * 5
    assert flops_of(loop, (3, 5), (6, 5, 5)) == 6 * layer
    # Backward: two products per layer; what is recomputed, x, needs none.
    assert flops_of(jax.grad(loop, argnums=(0, 1)), (3, 5), (6, 5, 5)) == 6 * 3 * layer


def test_branches_shards_and_unknown_loops() -> None:
    def branch(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert flops_of(branch, (4, 4)) == 2 * 2 * 4**3

    def rows(x: jax.Array, w: jax.Array) -> jax.Array:
        local = jax.shard_map(
            lambda x, w: x @ w, mesh=mesh_of(8), in_specs=(P("fsdp"), P()), out_specs=P("fsdp")
        )
        return local(x, w)

    assert flops_of(rows, (16, 5), (5, 7)) == 2 * 16 * 5 * 7  # 8 devices with 2 rows each

    def unknown(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="matrix products in a while loop"):
        flops_of(unknown, (4, 4))


def test_splash_counts_blocks_on_and_below_the_diagonal() -> None:
    """T = 1024 in blocks of 512: 3 of 4. Forward 2 products, backward 3 (dq) and 4 (dk, dv)."""
    attend = splash_attention(mesh_of(1), 4, 1024)
    shape = (2, 1024, 4, 16)
    block = 2 * 512 * 512 * 16
    each = 2 * 4 * 3  # rows, heads, blocks
    assert flops_of(lambda q, k, v: attend(q, k, v, None), shape, shape, shape) == each * 2 * block

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q, k, v, None).sum()

    gradients = jax.grad(loss, argnums=(0, 1, 2))
    row_sums = 2 * 2 * 1024 * 4 * 16  # of output times its gradient, outside the kernels
    assert flops_of(gradients, shape, shape, shape) == each * 9 * block + row_sums


def test_model_flops_of_the_3b_model() -> None:
    """6ND of the layers, 4 of the frozen head's 6, and attention: 0.126 x 6ND at 4096 tokens."""
    model = ModelConfig()
    layers, head = matmul_parameters(model)
    assert layers == 32 * (4 * 2560**2 + 3 * 2560 * 6912)  # 2.54e9
    assert head == 2560 * 50304
    attention = 6 * 32 * 4096 * 2560
    assert model_flops(model, 4096, frozen_head=False) == 6 * (layers + head) + attention
    assert model_flops(model, 4096, frozen_head=True) == 6 * layers + 4 * head + attention
    assert attention / (6 * (layers + head)) == pytest.approx(0.126, abs=5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots", "attention", "full"])
def test_flops_of_the_real_step_by_policy(remat: str) -> None:
    """The jitted SFT step on a mesh of 8: what each policy recomputes, to the product.

    XLA's attention over T = 256 computes blocks of 128 queries with all keys so far: 3/4 of the
    square.
    """
    model = ModelConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    settings = PhaseConfig(
        epochs=1, batch_size=16, seq_len=256, optimizer=OptimizerConfig(), accumulation=2
    )
    mesh = mesh_of(8)
    step = train_step.make_step("sft", settings, ComputeConfig(remat=remat), 10, mesh)
    batch = abstract_batch(settings, Request("sft", "", 1, rows=8), mesh)
    traced = step.trace(train_step.abstract_state(model, settings, mesh), batch)

    tokens, dim, inner, kv_dim = 16 * 256, 64, 96, 32
    down, layer = dim * inner, 2 * dim * dim + 2 * dim * kv_dim + 3 * dim * inner
    attention = 4 * 256 * dim * 3 // 4  # FLOPs per token of q k^T and of weights v
    forward = 3 * (2 * layer + attention)
    again = {
        "none": 0,
        "dots": 3 * attention // 2,  # the weights alone
        "attention": 3 * 2 * (layer - down) + 3 * attention // 2,
        "full": 3 * 2 * (layer - down) + 3 * attention,
    }[remat]
    head = 2 * dim * 512 * 2  # forward, and the derivative by its input with it
    assert jaxpr_flops(traced.jaxpr.jaxpr) == tokens * (3 * forward + again + head)


def test_bounds_by_hand() -> None:
    """16 v5e chips, 4 x 4 without a ring: a corner has two links of 50 GB/s."""
    where = parse_slice("v5e:4x4")
    assert (where.num_chips, where.num_devices, where.ici) == (16, 16, 100e9)
    bound = bounds(flops=16 * 197e12 * 2, moved=819e9, ici=50e9, where=where)
    assert bound == pytest.approx((2.0, 1.0, 0.5, 0.0))
    assert (bound.seconds, bound.exposed) == pytest.approx((2.0, 2.5))
    assert bound.name == "compute"
    assert bounds(1.0, 1.0, 1.0, parse_slice("v5e:1x1")).network == 0.0


def test_bounds_of_two_devices_a_chip_and_of_two_slices() -> None:
    """tpu7x: both devices of a chip share its FLOP/s, memory and links; 12.5 GB/s cross slices."""
    where = parse_slice("tpu7x:2x2x1")
    bound = bounds(2 * 4 * 2307e12, 7380e9 / 2, 200e9, where, num_slices=2, dcn=50e9)
    assert bound == pytest.approx((1.0, 1.0, 1.0, 4.0))
    assert (bound.seconds, bound.exposed, bound.name) == pytest.approx((4.0, 6.0, "DCN"))


@pytest.mark.parametrize(
    ("name", "devices", "links"),
    [
        ("v5e:16x16", 256, 4),  # rings along both
        ("v5e:8x16", 128, 3),
        ("v6e:2x4", 8, 2),
        ("v4:2x2x1", 4, 2),
        ("v4:4x4x8", 128, 6),
        ("v5p:2x2x2", 8, 3),
        ("tpu7x:2x2x1", 8, 2),  # two devices per chip
    ],
)
def test_slices(name: str, devices: int, links: int) -> None:
    where = parse_slice(name)
    assert where.name == name
    assert where.num_devices == devices
    assert where.ici == links * CHIPS[where.generation].link


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "'v9' is not one of v4, v5e, v5p, v6e, tpu7x; e.g. v4:2x2x2, v5e:4x4"),
        ("v5litepod-16", "'v5litepod-16' is not one of"),
        ("v3:4x4", "splash.* does not compile for v3; use one of v4"),
        ("v5e:4x4x4", "a v5e slice has 2 dimensions, v5e:AxB"),
        ("v4:4x4", "a v4 slice has 3 dimensions, v4:AxBxC"),
        ("v5e:0x4", "a v5e slice has 2 dimensions"),
        ("v5e:32x32", "has 1024 chips; a v5e pod has 256"),
    ],
)
def test_unknown_slices_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_slice(name)


def test_the_peak_of_a_device() -> None:
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU7x") == 2307e12 / 2  # two devices per chip
    assert peak_flops("cpu") is None


def test_published_figures_are_cited() -> None:
    """Each chip names its page; what a page gives for all links agrees with the link here."""
    between = {"v4": 200 / 4, "v5e": 6400 / 256, "v5p": 50, "v6e": 25600 / 256, "tpu7x": 100}
    both_ways = {"v5e": 400e9, "v5p": 1200e9, "v6e": 800e9, "tpu7x": 1200e9}
    for name, chip in CHIPS.items():
        assert chip.source == f"https://docs.cloud.google.com/tpu/docs/{name}"
        if name in both_ways:
            assert chip.link * 2 * 2 * chip.dims == both_ways[name]
        assert chip.dcn * 8 / 1e9 == between[name]
    assert dataclasses.is_dataclass(Slice)
