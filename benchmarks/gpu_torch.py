"""torch's side of `python -m benchmarks gpu`: transformers' StableLmForCausalLM.

torch is imported by the functions that use it. Axis letters: B row, T position, V vocabulary.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from benchmarks.gpu_case import (
    LEARNING_RATE,
    MIXCE_ETA,
    NEFTUNE_ALPHA,
    RANK_WEIGHT,
    TEMPERATURE,
    TOP_P,
    Case,
    batches,
    sampling,
    speed,
)

Measure = Callable[[], float]


def load(case: Case, dtype: Any, attention: str = "sdpa") -> tuple[Any, str]:
    """(random StableLmForCausalLM on its device, "cuda" or "cpu")."""
    import torch
    import transformers

    device = "cpu" if case.tiny else "cuda"
    torch.manual_seed(0)
    shape = dataclasses.asdict(case.model)
    config = transformers.StableLmConfig(**shape, attn_implementation=attention)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model, device


def about(device: str) -> dict[str, Any]:
    import torch

    if device == "cpu":
        return {"device": "cpu", "peak_bytes": None}
    torch.cuda.synchronize()
    name = torch.cuda.get_device_name()
    return {"device": name, "peak_bytes": torch.cuda.max_memory_allocated()}


def train(case: Case) -> tuple[Measure, dict[str, Any]]:
    """Float32 weights under bfloat16 autocast, flash attention or an error.

    Adafactor stands for Adalite: torch has no Adalite, and a factored state of the same kind.
    """
    import torch
    import transformers
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # Under a name that transformers makes no masks for: compiled, it makes one for "sdpa" even
    # where none is needed, which no flash kernel takes.
    transformers.AttentionInterface.register("sdpa_causal", sdpa_attention_forward)
    model, device = load(case, torch.float32, "sdpa_causal")
    model.train()
    if case.remat == "full":
        # Its name since transformers 5.20 or so, and the one before.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        next(getattr(model, name) for name in names if hasattr(model, name))()
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.weight.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adafactor(trained, lr=LEARNING_RATE)
    forward = torch.compile(model) if case.engine == "torch compiled" else model
    micro_batches = [
        {k: torch.from_numpy(v).to(device) for k, v in one.items()} for one in batches(case)
    ]

    def gradients(arrays: dict[str, Any]) -> None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # backward too: it recomputes
            with torch.autocast(device, torch.bfloat16):
                embedded = model.get_input_embeddings()(arrays["tokens"])
                scale = NEFTUNE_ALPHA / (embedded[0].numel() ** 0.5)
                noisy = embedded + torch.empty_like(embedded).uniform_(-scale, scale)
                logits = forward(inputs_embeds=noisy, use_cache=False).logits
            (loss(logits, arrays, case.phase) / len(micro_batches)).backward()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for arrays in micro_batches:
            gradients(arrays)
        optimizer.step()

    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(2):
        step()
    finish()
    return lambda: speed(step, finish, case.tokens), about(device)


def loss(logits: Any, arrays: dict[str, Any], phase: str) -> Any:
    """MixCE, and for rank CE + 5 x the ranking loss of a pair; logits [B, T, V]."""
    from torch.nn import functional

    targets, where = arrays["targets"].long(), arrays["loss_mask"]
    flat = functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), reduction="none"
    )
    logprobs = -flat.view(targets.shape)
    if phase == "sft":
        weights = MIXCE_ETA + (1 - MIXCE_ETA) * logprobs.detach().exp()
        return -(weights * logprobs * where).sum() / where.sum()
    ranked = arrays["rank_mask"]
    means = (logprobs * ranked).sum(-1) / ranked.sum(-1).clamp(min=1)  # a row is a text: [B]
    chosen, rejected = means[arrays["candidate_rows"].long()].unbind(-1)  # [G] each
    ranking = functional.softplus(rejected - chosen).mean()
    return -(logprobs * where).sum() / where.sum() + RANK_WEIGHT * ranking


def sample(case: Case) -> tuple[Measure, dict[str, Any]]:
    import torch

    model, device = load(case, torch.bfloat16)
    model.eval()
    prompts, new_tokens = sampling(case)
    tokens = torch.tensor(prompts, device=device)
    options = {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0}
    options |= {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}

    def measure() -> float:
        begun = time.perf_counter()
        mask = torch.ones_like(tokens)
        found = model.generate(tokens, attention_mask=mask, pad_token_id=0, **options)
        drawn = found[:, tokens.shape[1] :].cpu()
        return drawn.numel() / (time.perf_counter() - begun)

    measure()
    return measure, about(device)
