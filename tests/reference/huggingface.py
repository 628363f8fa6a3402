"""transformers' LLaMA as a reference: built from named weights, in any dtype, fp64 truly fp64.

transformers computes some of LLaMA in fp32 whatever the model's dtype: RMSNorm, RoPE's frequencies
and angles, the eager softmax, the loss. In bf16 that is the model; in fp64 it costs eight digits.
`lift_fp32_islands` makes those parts fp64, running transformers' own code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, LlamaForCausalLM

from . import IGNORED, Batch, Result, ShapeLike, document_positions, rope_scaling

Attention = Literal["eager", "sdpa"]

_MODULES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}


class _Float32IsFloat64(TorchFunctionMode):
    """Whoever asks torch for fp32 gets fp64."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        def lift(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            func = Tensor.double
        kwargs = {key: lift(value) for key, value in (kwargs or {}).items()}
        return func(*map(lift, args), **kwargs)


@contextlib.contextmanager
def lift_fp32_islands() -> Iterator[None]:
    """Within, what transformers' LLaMA asks to be fp32 is fp64. For fp64 models only.

    Build the model within too: RoPE's frequencies are computed, in fp32, when it is built, and a
    later `.double()` keeps their rounding. Process state is untouched: the context is a torch
    function mode, gone at its end, and of this thread alone.
    """
    with _Float32IsFloat64():
        yield


def huggingface_name(name: str) -> str:
    """transformers' name of the weight that Meta calls `name`."""
    module = name.removesuffix(".weight")
    if not module.startswith("layers."):
        return f"{_MODULES[module]}.weight"
    _, layer, rest = module.split(".", 2)
    return f"model.layers.{layer}.{_MODULES[rest]}.weight"


def _config(shape: ShapeLike) -> LlamaConfig:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": shape.rope_theta}
    scaling = rope_scaling(shape)
    if scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.d_model,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=1 << 20,  # allocates nothing; must exceed the original context
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=shape.tie_embeddings,
        rope_parameters=rope,
        use_cache=False,  # a cache turns packed documents' mask off, silently
    )


def build(
    shape: ShapeLike,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float64,
    attn: Attention = "eager",
) -> LlamaForCausalLM:
    """transformers' model with these weights, rounded to `dtype`, on the weights' device.

    It is made in its dtype rather than cast to it: `model.to(bfloat16)` would round RoPE's
    frequencies, which transformers keeps in fp32. Raises RuntimeError for a missing, an unknown or
    a misshapen weight.
    """
    with torch.random.fork_rng(devices=[]):  # its own initial weights draw from the global state
        model = LlamaForCausalLM._from_config(_config(shape), dtype=dtype, attn_implementation=attn)
    state = {huggingface_name(name): weight.detach() for name, weight in weights.items()}
    if shape.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model.to(device=next(iter(weights.values())).device)


def _logits(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Logits (B, S, V). The document mask is ours, additive: transformers need not infer it."""
    tokens, _, document_lengths = batch
    if document_lengths is None:
        return model(input_ids=tokens).logits
    documents, positions = document_positions(document_lengths, tokens.shape[1])
    allowed = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
    mask = torch.zeros(allowed.shape, dtype=model.dtype).masked_fill(~allowed, -torch.inf)
    return model(
        input_ids=tokens,
        attention_mask=mask.to(tokens.device),
        position_ids=positions.to(tokens.device),
    ).logits


def _loss(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """Cross-entropy, in fp32 where the model is of lower precision, as transformers has it."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction=reduction
    )


def _islands(dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    return lift_fp32_islands() if dtype == torch.float64 else contextlib.nullcontext()


def forward_backward(
    shape: ShapeLike,
    weights: Mapping[str, Tensor],
    tokens: Tensor,
    labels: Tensor,
    dtype: torch.dtype = torch.float64,
    document_lengths: Sequence[Sequence[int]] | None = None,
    reduction: Literal["sum", "mean"] = "sum",
    attn: Attention = "eager",
) -> Result:
    """Loss over the labels that are not -100 (already shifted), logits, every gradient.

    With fp64 the islands are lifted; with bf16 they are as transformers has them.
    """
    with _islands(dtype):
        model = build(shape, weights, dtype, attn)
        logits = _logits(model, Batch(tokens, labels, document_lengths))
        loss = _loss(logits, labels, reduction)
        loss.backward()
    grads = {name: model.get_parameter(huggingface_name(name)).grad for name in weights}
    return Result(loss.detach(), logits.detach(), grads)


@dataclass(frozen=True)
class AdamW:
    """How `adamw_loop` steps: `lr` maps a step, from 0, to its rate; `clip` None clips nothing.

    The clip factor is torch's, clip / (norm + 1e-6), where that is below 1.
    """

    lr: Callable[[int], float]
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float | None = 1.0


class Training(NamedTuple):
    """Each step's mean loss and gradient norm before clipping; the weights after the last."""

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, Tensor]


def adamw_loop(
    shape: ShapeLike,
    weights: Mapping[str, Tensor],
    batches: Sequence[Batch],
    steps: int,
    settings: AdamW,
    dtype: torch.dtype = torch.float64,
) -> Training:
    """Trains on batches[step % len(batches)], each step's loss the mean over its valid tokens.

    Weights and AdamW's moments are in `dtype` (no fp32 masters), so fp64 or fp32 is meant; matrices
    decay, norms do not. Raises ValueError for a batch without a valid token.
    """
    if any(bool((batch.labels == IGNORED).all()) for batch in batches):
        raise ValueError("a batch has no valid token")
    losses, norms = [], []
    with _islands(dtype):
        model = build(shape, weights, dtype)
        optimizer = _optimizer(model, settings)
        for step in range(steps):
            batch = batches[step % len(batches)]
            for group in optimizer.param_groups:
                group["lr"] = settings.lr(step)
            optimizer.zero_grad(set_to_none=True)
            loss = _loss(_logits(model, batch), batch.labels, "mean")
            loss.backward()
            clip = torch.inf if settings.clip is None else settings.clip
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip, foreach=False)
            optimizer.step()
            losses.append(loss.item())
            norms.append(norm.item())
    final = {name: model.get_parameter(huggingface_name(name)).detach().clone() for name in weights}
    return Training(losses, norms, final)


def _optimizer(model: LlamaForCausalLM, settings: AdamW) -> torch.optim.AdamW:
    parameters = list(model.parameters())  # a tied weight comes once
    groups = [
        {"params": [p for p in parameters if p.dim() == 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() != 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=0.0, betas=settings.betas, eps=settings.eps, foreach=False, fused=False
    )
