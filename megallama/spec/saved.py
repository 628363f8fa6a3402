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


#: What a layer keeps from a split backward, B, to its W. Shards alone: W gathers again `dz` and
#: `dx2`, the gradients of what W2 and Wo returned, and `n1` and `n2`, because whole they would be
#: four residual streams on every tensor rank. `act` is SwiGLU's output, `dgate_up` and `dqkv` the
#: gradients of W13's and Wqkv's outputs.
WEIGHT_STATE = frozenset({"dz", "act", "dgate_up", "n2", "dx2", "o", "dqkv", "n1"})


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
    saved = POLICIES[policy]
    elements = _elements(model, tokens, tensor, sequence_parallel)
    # The log-sum-exp is kept in fp32 (fp64 under fp64): one number a head.
    heads = model.heads // tensor
    statistics = tokens * heads * max(itemsize, 4) if "lse" in saved else 0
    return statistics + itemsize * sum(elements[name] for name in saved - {"lse"})


def weight_state_bytes(
    model: Model, itemsize: int, tokens: int = 1, tensor: int = 1, sequence_parallel: bool = True
) -> int:
    """Bytes that one decoder layer keeps of a micro-batch from B to W; arguments as above."""
    elements = _elements(model, tokens, tensor, sequence_parallel)
    return itemsize * sum(elements[name] for name in WEIGHT_STATE)


def _elements(model: Model, tokens: int, tensor: int, sequence_parallel: bool) -> dict[str, int]:
    """Elements of each tensor of a layer, on one of `tensor` ranks."""
    stream = (tokens // tensor if sequence_parallel else tokens) * model.d_model
    heads, kv_heads = model.heads // tensor, max(1, model.kv_heads // tensor)
    projected = tokens * (heads + 2 * kv_heads) * model.head_width
    act = tokens * model.ffn // tensor
    return {
        **dict.fromkeys(("x", "n1", "x2", "n2", "dx2", "dz"), stream),
        **dict.fromkeys(("qkv", "dqkv"), projected),
        **dict.fromkeys(("gate_up", "dgate_up"), 2 * act),
        "o": tokens * heads * model.head_width,
        "act": act,
    }
