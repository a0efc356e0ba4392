"""The model's `Ops` on a mesh: where it differs from one device, in one place."""

from functools import partial

import jax
from jax.sharding import Mesh

from memphis_jax.attention import pick_attention
from memphis_jax.model import ONE_DEVICE, Ops
from memphis_jax.sharding import constrain, lookup, num_shards

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
