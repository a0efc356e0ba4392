"""The model's `Ops` on a mesh: where it differs from one device, in one place."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from memphis_jax.attention import pick_attention
from memphis_jax.layers import embedding
from memphis_jax.model import ONE_DEVICE, Ops
from memphis_jax.sharding import ACTIVATIONS, ROWS, constrain, leaf_spec, num_shards

# Layers in a turn of the loop on one device: a loop copies into and out of stacks.
UNROLL = {"cpu": 8, "gpu": 32}


def make_ops(mesh: Mesh | None, attention: str) -> Ops:
    """Lookup, layouts and the attention kernel of a mesh; the defaults for None, one plain device.

    The kernel is picked by the platform of the mesh's devices, which may be another than this
    process runs on. Tracing raises ConfigError where the named kernel cannot serve.
    """
    if mesh is None:
        return ONE_DEVICE
    platform = mesh.devices.flat[0].platform

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None
    ) -> jax.Array:
        kernel = pick_attention(
            attention,
            platform,
            mesh,
            num_heads=q.shape[2],
            num_kv_heads=k.shape[2],
            head_dim=q.shape[3],
            seq_len=q.shape[1],
            dtype=q.dtype.name,
        )
        return kernel(q, k, v, segment_ids)

    if mesh.size == 1:
        return Ops(attention=attend, unroll=UNROLL.get(platform, 1))
    return Ops(
        lookup=partial(lookup, mesh=mesh),
        constrain=partial(constrain, mesh=mesh),
        attention=attend,
        num_shards=num_shards(mesh),
    )


def lookup(table: jax.Array, tokens: jax.Array, dtype: jnp.dtype | str, *, mesh: Mesh) -> jax.Array:
    """`layers.embedding` for a table [V, D] over (model, fsdp): [B, T, D], a "residual".

    Tokens travel instead of the table: each device looks up all rows of its fsdp group in its part
    of D and V, then the parts change places. The gradient comes out divided like the table.
    """
    parts = mesh.shape["model"]
    vocab_axis = leaf_spec("embed_tokens", table.shape, dict(mesh.shape))[0] if parts > 1 else None

    def local(table: jax.Array, tokens: jax.Array) -> jax.Array:  # [V/m, D/f], [B/(d f), T]
        tokens = jax.lax.all_gather(tokens, "fsdp", axis=0, tiled=True)  # [B/d, T]
        if vocab_axis is None:
            length = tokens.shape[1] // parts
            start = jax.lax.axis_index("model") * length
            own = jax.lax.dynamic_slice_in_dim(tokens, start, length, axis=1)
            x = embedding(table, own, dtype)
        else:
            size = table.shape[0]
            own = tokens - jax.lax.axis_index("model") * size
            x = embedding(table, jnp.clip(own, 0, size - 1), dtype)
            x = x * ((own >= 0) & (own < size))[..., None].astype(x.dtype)
            # Every token is in the part of one device: adding the others' zeros changes no bit.
            x = jax.lax.psum_scatter(x, "model", scatter_dimension=1, tiled=True)
        # [B/d, T/m, D/f] -> [B/(d f), T/m, D]
        return jax.lax.all_to_all(x, "fsdp", split_axis=0, concat_axis=2, tiled=True)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(vocab_axis, "fsdp"), P(ROWS, None)),
        out_specs=ACTIVATIONS["residual"],
        check_vma=False,
    )(table, tokens)
