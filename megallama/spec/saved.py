"""What a decoder layer keeps from its forward to its backward, by policy, and the bytes it costs.

The LLaMA paper (arXiv 2302.13971, §2.4) saves the outputs of the linear layers and recomputes the
rest; that is `linear_outputs`, the default. This is the one place where a policy's bytes are
declared; a test holds them against the storage that a real step keeps.
"""

from __future__ import annotations

from megallama.config.schema import Model

LINEAR_OUTPUTS = frozenset({"x", "qkv", "o", "lse", "x2", "gate_up"})

#: Policy → the names a layer saves. `x` is the layer's input, `qkv` after RoPE, `o` and `lse`
#: attention's output and log-sum-exp, `x2` the residual after attention, `gate_up` the two halves
#: of W13's output, `n1` and `n2` the norms' outputs. SwiGLU's output is never worth keeping: its
#: backward emits it in the pass that it makes anyway.
POLICIES: dict[str, frozenset[str]] = {
    "all": LINEAR_OUTPUTS | {"n1", "n2"},
    "linear_outputs": LINEAR_OUTPUTS,
    "no_attention_output": LINEAR_OUTPUTS - {"o", "lse"},
    "no_gate_up": LINEAR_OUTPUTS - {"gate_up"},
    "layer_input": frozenset({"x"}),
}


def saved_bytes(
    model: Model,
    policy: str,
    itemsize: int,
    tokens: int = 1,
    tensor: int = 1,
    sequence_parallel: bool = True,
) -> int:
    """Bytes that one decoder layer saves of a micro-batch of `tokens`, on one of `tensor` ranks.

    `itemsize` is the compute dtype's. The residual stream is divided by sequence parallelism, heads
    and the feed-forward width by the tensor ranks; fewer key/value heads than ranks are replicated.
    """
    width, shard = model.head_width, tokens // tensor if sequence_parallel else tokens
    heads, kv_heads = model.heads // tensor, max(1, model.kv_heads // tensor)
    elements = {
        "x": shard * model.d_model,
        "n1": shard * model.d_model,
        "qkv": tokens * (heads + 2 * kv_heads) * width,
        "o": tokens * heads * width,
        "x2": shard * model.d_model,
        "n2": shard * model.d_model,
        "gate_up": tokens * 2 * model.ffn // tensor,
    }
    saved = POLICIES[policy]
    # The log-sum-exp is kept in fp32 (fp64 under fp64): one number a head.
    statistics = tokens * heads * max(itemsize, 4) if "lse" in saved else 0
    return statistics + itemsize * sum(n for name, n in elements.items() if name in saved)
