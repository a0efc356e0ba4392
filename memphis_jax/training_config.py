"""What a user sets of training: compute, optimizer, phases, the mesh; and what has to fit together.

Part of `config.py`, which the rest of the program imports.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from memphis_jax.fields import not_negative, one_of, positive, require, share
from memphis_jax.model_config import ModelConfig

# What of a layer's forward pass is kept for the backward pass, from most to least.
REMAT = {
    "none": "everything",
    "dots": "every matmul's result and attention's",
    "attention": "the attention's output",
    "full": "nothing but the layer's input",
}
ATTENTION = ("auto", "xla", "splash", "cudnn")


@dataclass(frozen=True)
class ComputeConfig:
    dtype: str = "float32"  # of activations and matmuls; parameters and losses stay float32
    remat: str = "full"  # what the backward pass recomputes: REMAT
    attention: str = "auto"  # ATTENTION; "auto" = the fastest that honours segments, by platform
    logprob_chunk: int = 512  # tokens whose logits exist at once, on each device
    profile_step: int = 0  # it and the next two are traced into WORKDIR/profile; 0 = none

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, ("float32", "bfloat16"))
        one_of("remat", self.remat, tuple(REMAT))
        one_of("attention", self.attention, ATTENTION)
        positive(self, "logprob_chunk")
        not_negative(self, "profile_step")


@dataclass(frozen=True)
class OptimizerConfig:
    name: str = "adalite"
    learning_rate: float = 1e-5  # peak
    warmup_ratio: float = 0.2  # share of the phase's steps
    clip_norm: float = 0.0  # global gradient norm; 0 = off
    freeze_embeddings: bool = True  # input embedding and lm_head
    # adalite
    eps: float = 1e-5
    lambda_: float = 0.01  # weight of the norm-loss pull towards unit norm
    beta_decay: float = 0.8
    centralize: bool = True
    momentum: float = 0.0
    # adamw
    b1: float = 0.9
    b2: float = 0.999
    adam_eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        one_of("name", self.name, ("adalite", "adamw"))
        positive(self, "learning_rate", "eps", "adam_eps")
        not_negative(self, "clip_norm", "lambda_", "beta_decay", "weight_decay")
        share(self, "warmup_ratio", "momentum", "b1", "b2")
        for name in ("momentum", "b1", "b2"):
            require(getattr(self, name) < 1, f"{name} = {getattr(self, name)} must be below 1")
        require(
            math.isfinite(self.learning_rate), f"learning_rate = {self.learning_rate} is not finite"
        )


@dataclass(frozen=True)
class PhaseConfig:
    """One training phase, SFT or rank."""

    epochs: int
    batch_size: int  # SFT: packed rows of seq_len tokens; rank: groups (pairs); per optimizer step
    seq_len: int  # tokens in a packed row
    optimizer: OptimizerConfig
    accumulation: int = 1  # micro-batches of batch_size / accumulation
    mixce_eta: float = 1.0  # 1 = cross entropy
    neftune_alpha: float = 0.0  # 0 = off
    rank_weight: float = 0.0  # weight of the ranking loss
    keep_optimizer_state: bool = False  # start from the previous phase's optimizer statistics
    checkpoint_every: int = 500  # steps; the last step is always saved
    keep_checkpoints: int = 2
    log_every: int = 10  # steps

    def __post_init__(self) -> None:
        positive(self, "epochs", "batch_size", "accumulation", "seq_len")
        positive(self, "checkpoint_every", "keep_checkpoints", "log_every")
        share(self, "mixce_eta")
        not_negative(self, "neftune_alpha", "rank_weight")
        require(
            self.batch_size % self.accumulation == 0,
            f"batch_size = {self.batch_size} is not divisible by accumulation = "
            f"{self.accumulation}",
        )


@dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each axis; -1, for one of them at most, takes what is left."""

    data: int = 1  # whole copies of the model; several TPU slices lie along it
    fsdp: int = -1  # devices that share parameters and optimizer state, each with rows of its own
    model: int = 1  # devices that share the heads, the MLP and the positions of a row

    def __post_init__(self) -> None:
        axes = dataclasses.asdict(self)
        for name, size in axes.items():
            require(size == -1 or size > 0, f"{name} = {size} must be 1 or more, or -1 (the rest)")
        require(
            list(axes.values()).count(-1) <= 1, f"mesh {axes}: only one axis can take the rest (-1)"
        )

    def sizes(self, num_devices: int) -> dict[str, int]:
        """{axis: size} for so many devices. Raises ConfigError where they do not fit."""
        axes = dataclasses.asdict(self)
        given = math.prod(size for size in axes.values() if size != -1)
        if -1 in axes.values():
            require(
                num_devices % given == 0,
                f"mesh {axes}: {num_devices} devices do not divide by {given}; set the axes so "
                "that their product does",
            )
            return {name: num_devices // given if n == -1 else n for name, n in axes.items()}
        require(
            given == num_devices,
            f"mesh {axes} needs {given} devices, there are {num_devices}; set one axis to -1",
        )
        return axes


def check_context(
    model: ModelConfig, phases: Mapping[str, PhaseConfig], max_new_tokens: int = 0
) -> None:
    """Raises ConfigError for rows or answers that are longer than the model's context.

    `model` is the one that is trained: that of the checkpoint, where a run starts from one.
    """
    context = model.max_position_embeddings
    for phase, settings in phases.items():
        require(
            settings.seq_len <= context,
            f"{phase}.seq_len = {settings.seq_len} exceeds the model's max_position_embeddings = "
            f"{context}; set --config.{phase}.seq_len={context} or less",
        )
    require(
        max_new_tokens < context,
        f"generate.max_new_tokens = {max_new_tokens} leaves no room for a question: the model's "
        f"max_position_embeddings is {context}",
    )


def check_mesh(
    model: ModelConfig, mesh: Mapping[str, int], phases: Mapping[str, PhaseConfig]
) -> None:
    """Raises ConfigError where a model or a phase does not divide over a mesh {axis: size}.

    And where `check_context` does.
    """
    check_context(model, phases)
    fsdp, parts = mesh["fsdp"], mesh["model"]
    for name, axes in (
        ("num_attention_heads", ("model",)),
        ("num_key_value_heads", ("model",)),
        ("hidden_size", ("fsdp", "model")),
        ("intermediate_size", ("fsdp", "model")),
    ):
        for axis in axes:
            value = getattr(model, name)
            require(
                value % mesh[axis] == 0,
                f"{name} = {value} is not divisible by mesh.{axis} = {mesh[axis]}; choose a "
                f"mesh.{axis} that divides it",
            )
    shards = mesh["data"] * fsdp
    for phase, settings in phases.items():
        micro = settings.batch_size // settings.accumulation
        require(
            micro % shards == 0,
            f"{phase}: a micro-batch of {micro} (batch_size {settings.batch_size} / accumulation "
            f"{settings.accumulation}) is not divisible by mesh.data x mesh.fsdp = {shards}; "
            "change batch_size, accumulation or the mesh",
        )
        require(
            settings.seq_len % parts == 0,
            f"{phase}.seq_len = {settings.seq_len} is not divisible by mesh.model = {parts}",
        )
