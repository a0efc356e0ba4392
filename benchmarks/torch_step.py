"""The training step that users of transformers + torch have; torch is imported by its functions.

Axis letters: B row, T position.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import harness, workload
from benchmarks.workload import Size

RANK_WEIGHT = 5.0


def prepare(size: Size, phase: str, *, compiled: bool) -> Callable[[int], None]:
    """Runs so many steps of StableLmForCausalLM with sdpa, float32 and AdamW."""
    import torch

    torch.manual_seed(0)
    model = load(size)
    step_model = torch.compile(model) if compiled else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    batch = rank_arrays(size) if phase == "rank" else sft_arrays(size)
    tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
    loss = rank_loss if phase == "rank" else sft_loss

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss(step_model, tensors).backward()
            optimizer.step()

    return run


def load(size: Size) -> Any:
    import transformers

    config = transformers.StableLmConfig(**size.shape, attn_implementation="sdpa", use_cache=False)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.weight.requires_grad_(not size.freeze)
    return model


def sft_arrays(size: Size) -> dict[str, np.ndarray]:
    """The packed rows as texts; labels as transformers wants them: not shifted, -100 = none."""
    packed = workload.sft_batch(size)
    tokens = packed["tokens"].astype(np.int64)
    labels = np.full_like(tokens, -100)
    labels[:, 1:] = np.where(packed["loss_mask"], packed["targets"], -100)[:, :-1]
    return {"input_ids": tokens, "labels": labels}


def sft_loss(model: Any, batch: Any) -> Any:
    return model(**batch).loss


def rank_arrays(size: Size) -> dict[str, np.ndarray]:
    """All chosen answers, all rejected ones, all ground truths: padded to the longest, [3 G, T]."""
    groups = workload.groups(size)
    members = [g.candidates[0] for g in groups] + [g.candidates[1] for g in groups]
    members += [g.gold for g in groups]
    longest = max(len(member.tokens) for member in members) - 1
    arrays = {
        name: np.zeros((len(members), longest), np.int64)
        for name in ("input_ids", "targets", "attention_mask", "trained")
    }
    for row, member in enumerate(members):
        slots = len(member.tokens) - 1
        arrays["input_ids"][row, :slots] = member.tokens[:-1]
        arrays["targets"][row, :slots] = member.tokens[1:]
        arrays["attention_mask"][row, :slots] = 1
        arrays["trained"][row, :slots] = member.loss_mask[1:]
    return arrays


def rank_loss(model: Any, batch: Any) -> Any:
    """CE of the ground truths + 5 x softplus(rejected - chosen) of logprobs per token."""
    import torch

    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logprobs = -torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), batch["targets"], reduction="none"
    )
    trained = batch["trained"].to(logprobs.dtype)  # [3 G, T]
    sums, counts = (logprobs * trained).sum(-1), trained.sum(-1)
    chosen, rejected, _ = (sums / counts).chunk(3)
    ce = -sums.chunk(3)[2].sum() / counts.chunk(3)[2].sum()
    return ce + RANK_WEIGHT * torch.nn.functional.softplus(rejected - chosen).mean()


def ceiling(size: int) -> float:
    """FLOP/s of a float32 product."""
    import torch

    x = torch.ones(size, size)
    return harness.matmul_ceiling(lambda: torch.mm(x, x), size)
