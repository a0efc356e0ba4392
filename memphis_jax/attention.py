"""Which attention kernel a step is compiled with: splash on TPU, cuDNN on GPU, XLA elsewhere.

`pick_attention` gives the callable that `StableLM.hidden` takes. Every kernel here computes what
`layers.causal_attention` does, causal inside segments; one that cannot raises, it never trains on
another mask. Imports `config` and `model`.

Axis letters: B batch, T position, N heads, K kv-heads, H head dim.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from memphis_jax.config import ConfigError
from memphis_jax.layers import causal_attention

# attention(q [B,T,N,H], k [B,T,K,H], v [B,T,K,H], segment_ids [B,T] int32 or None) -> [B,T,N,H]
Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]

PLATFORM = {"splash": "tpu", "cudnn": "gpu"}  # the one that each kernel is written for
BLOCKS = (512, 384, 256, 128)  # positions in a tile of splash; 512 is what MaxText uses
CUDNN_HEAD_DIM = 128  # the most that a GPU before Hopper takes
CUDNN_SEGMENTS = (2, 16)  # of a row, padding counted: sizes of the packed layout, rising
BATCH = ("data", "fsdp")  # mesh axes over which rows are split


def pick_attention(
    name: str,
    platform: str,
    mesh: Mesh,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    seq_len: int,
    dtype: str = "bfloat16",
) -> Attention:
    """The attention kernel called `name`, or for "auto" the best one that can do the work.

    Args:
      name: "splash" (Pallas, TPU), "cudnn" (GPU), "xla" (anywhere; scores of 128 queries exist at
        once) or "auto": splash or cuDNN on its platform where it can, else xla.
      platform: what the step is compiled for, "tpu", "gpu" or "cpu"; "cuda" and "rocm" are GPUs.
      mesh: axes `data` and `fsdp` split rows, `model` splits heads; splash and cuDNN run under
        shard_map over it.
      num_heads, num_kv_heads, head_dim, seq_len: N, K, H, T of the model and its rows.
      dtype: of q, k and v.

    Returns:
      attention(q [B,T,N,H], k [B,T,K,H], v [B,T,K,H], segment_ids [B,T] int32 or None) ->
      [B,T,N,H]:  softmax(q k^T / sqrt(H)) v over keys of the same segment that are not later.
      The kernels' outputs and row statistics bear the name "attention", for remat policies.

    Raises:
      ConfigError: `name` is unknown, or that kernel cannot do this; names value and fix.
    """
    obstacles = partial(
        _obstacle,
        platform="gpu" if platform in ("cuda", "rocm") else platform,
        rocm=platform == "rocm",
        mesh=mesh,
        heads=(num_heads, num_kv_heads),
        head_dim=head_dim,
        seq_len=seq_len,
        dtype=dtype,
    )
    if name == "auto":
        name = next((kernel for kernel in PLATFORM if not obstacles(kernel)), "xla")
    elif name in PLATFORM and (obstacle := obstacles(name)):
        raise ConfigError(f"compute.attention = {name!r}: {obstacle}")
    if name == "xla":
        return causal_attention
    if name == "splash":
        return splash_attention(mesh, num_heads, seq_len)
    if name == "cudnn":
        return cudnn_attention(mesh, mesh.devices.flat[0].compute_capability)
    raise ConfigError(
        f"compute.attention = {name!r} is not one of 'auto', 'xla', 'splash', 'cudnn'"
    )


def _obstacle(
    kernel: str,
    *,
    platform: str,
    rocm: bool,
    mesh: Mesh,
    heads: tuple[int, int],
    head_dim: int,
    seq_len: int,
    dtype: str,
) -> str:
    """Why `kernel` cannot do this, with the way out; "" if it can."""
    if platform != PLATFORM[kernel]:
        return f"it needs a {PLATFORM[kernel].upper()}, this step is for {platform}; use 'auto'"
    for field, count in zip(("num_attention_heads", "num_key_value_heads"), heads, strict=True):
        if count % mesh.shape["model"]:
            return (
                f"{field} = {count} is not divisible by mesh.model = {mesh.shape['model']}; "
                "use a divisor, or 'xla'"
            )
    if kernel == "splash":
        kind = mesh.devices.flat[0].device_kind
        if kind.startswith(("TPU v2", "TPU v3")):
            return f"it does not compile for {kind}; use a v4 or newer, or 'xla'"
        if seq_len % BLOCKS[-1]:
            return f"seq_len = {seq_len} is not a multiple of {BLOCKS[-1]}; round it up, or 'xla'"
        return ""
    if rocm or not _has_cudnn():
        return "JAX finds no cuDNN here; pip install -e '.[cuda12]' in the checkout, or use 'xla'"
    if dtype not in ("bfloat16", "float16"):
        return f"it does not take compute.dtype = {dtype!r}; use 'bfloat16', or 'xla'"
    if head_dim % 8 or head_dim > CUDNN_HEAD_DIM:
        return f"head_dim = {head_dim} is not a multiple of 8 up to {CUDNN_HEAD_DIM}; use 'xla'"
    if seq_len % 2:
        return f"seq_len = {seq_len} is odd; round it up, or 'xla'"
    return ""


def _has_cudnn() -> bool:
    from jax._src.lib import cuda_versions

    return cuda_versions is not None


def splash_attention(
    mesh: Mesh, num_heads: int, seq_len: int, *, interpret: bool = False
) -> Attention:
    """Splash attention (flash attention on TPU that skips masked blocks) under shard_map.

    Forward and backward hold one tile of scores. Segment ids mask inside the kernel; only the
    causal part skips work. head_dim needs no padding. interpret=True runs it anywhere, slowly, for
    tests. Source: jax.experimental.pallas.ops.tpu.splash_attention, which applies no scale.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block = next(size for size in BLOCKS if seq_len % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: dict[str, Any] = {f"block_{name}": block for name in names}
    local_heads = num_heads // mesh.shape["model"]
    with jax.ensure_compile_time_eval():  # a step that is being traced may ask for it
        kernel = splash.make_splash_mha(
            mask=masks.MultiHeadMask([masks.CausalMask((seq_len, seq_len))] * local_heads),
            block_sizes=splash.BlockSizes(**sizes),
            head_shards=1,
            q_seq_shards=1,
            save_residuals=True,
            interpret=interpret,
        )
        # Constants of the program, not of this process's device: it may run on another.
        kernel = jax.tree.map(np.asarray, kernel)

    def scaled(q: jax.Array) -> jax.Array:
        return (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, ids: Any) -> tuple[jax.Array, Any]:
        heads = (x.swapaxes(1, 2) for x in (scaled(q), k, v))  # [B, heads, T, H]
        out, (logsumexp,) = jax.vmap(kernel)(*heads, ids)
        # Kept as [B, T, N * H]: a last axis of H = 80 would be padded to 128.
        out = out.swapaxes(1, 2).reshape(*q.shape[:2], -1)
        out, logsumexp = checkpoint_name((out, logsumexp), "attention")
        return out.reshape(q.shape), (q, k, v, ids, out, logsumexp)

    def backward(saved: Any, dout: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
        q, k, v, ids, out, logsumexp = saved

        def row(*heads_and_ids: Any) -> Any:
            q, k, v, out, dout, logsumexp, ids = heads_and_ids
            masks = (kernel.dq_mask_info, kernel.dkv_mask_info)
            residuals = (q, k, v, ids, None, out, logsumexp, *masks)
            gradients = splash._splash_attention_bwd(res=residuals, do=dout, **kernel.kwargs)
            return gradients[3:6]

        outs = (scaled(q), k, v, out.reshape(q.shape), dout)
        heads = (x.swapaxes(1, 2) for x in outs)  # [B, heads, T, H]
        dq, dk, dv = (x.swapaxes(1, 2) for x in jax.vmap(row)(*heads, logsumexp, ids))
        return scaled(dq), dk, dv, None

    # The kernel's own rule would keep its output as [N, T, H].
    attend = jax.custom_vjp(lambda *args: forward(*args)[0])
    attend.defvjp(forward, backward)

    def attention(
        q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None
    ) -> jax.Array:
        ids = None if segment_ids is None else splash.SegmentIds(segment_ids, segment_ids)
        return attend(q, k, v, ids)

    return _sharded(mesh, attention)


def cudnn_attention(mesh: Mesh, capability: str) -> Attention:
    """cuDNN's fused attention under shard_map, for GPUs of a compute capability, such as "9.0".

    From Hopper on, rows of few segments take its packed layout, which computes no score across
    segments; its backward pass writes most * T * N * H float32 per row, `most` the first of
    CUDNN_SEGMENTS that has room. Other rows, and older GPUs, give it the mask as a bias
    [B, 1, T, T] in q's dtype, which is several times slower at T = 4096 (docs/performance.md).
    """
    hopper = float(capability) >= 9.0

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None
    ) -> jax.Array:
        if segment_ids is None:
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        branches = [partial(_biased, segment_ids=segment_ids)]
        if not hopper:
            return branches[0](q, k, v)
        starts, lengths = segment_runs(segment_ids, max(CUDNN_SEGMENTS))
        count = (starts >= 0).sum(axis=1).max()
        for most in reversed(CUDNN_SEGMENTS):
            runs = starts[:, :most], lengths[:, :most]
            branches.insert(0, partial(_packed, starts=runs[0], lengths=runs[1]))
        level = sum((count > most).astype(jnp.int32) for most in CUDNN_SEGMENTS)
        return jax.lax.switch(level, branches, q, k, v)

    return _sharded(mesh, attend)


def segment_runs(segment_ids: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Where the first runs of equal ids [B, T] begin [B, most + 1], and lengths [B, most]; int32.

    Padding is a run like others. -1 stands where there is none: the last start is another number
    only in a row of more than `most` runs.
    """
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    begins = jnp.pad(changed, ((0, 0), (1, 0)), constant_values=True)  # [B, T]
    find = partial(jnp.nonzero, size=most + 1, fill_value=-1)
    starts = jax.vmap(lambda row: find(row)[0])(begins).astype(jnp.int32)
    ends = jnp.where(starts[:, 1:] < 0, segment_ids.shape[1], starts[:, 1:])
    return starts, jnp.where(starts[:, :-1] < 0, -1, ends - starts[:, :-1])


def _packed(
    q: jax.Array, k: jax.Array, v: jax.Array, *, starts: jax.Array, lengths: jax.Array
) -> jax.Array:
    """Every run [B, most] a sequence of its own: a layout that jax.nn does not offer."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    offsets = jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)  # one more is asked for
    out: jax.Array = dot_product_attention(
        q,
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=q.shape[-1] ** -0.5,
        mask_type=MaskType.PADDING_CAUSAL,
    )
    return out


def _biased(q: jax.Array, k: jax.Array, v: jax.Array, *, segment_ids: jax.Array) -> jax.Array:
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]  # [B, 1, T, T]
    mask = same & jnp.tri(q.shape[1], dtype=bool)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")


def _sharded(mesh: Mesh, attend: Attention) -> Attention:
    """`attend` on every device's own rows and heads: neither meets another device's."""
    heads, ids = P(BATCH, None, "model", None), P(BATCH, None)

    def attention(
        q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None
    ) -> jax.Array:
        return jax.shard_map(
            attend, mesh=mesh, in_specs=(heads, heads, heads, ids), out_specs=heads, check_vma=False
        )(q, k, v, segment_ids)

    return attention
