"""How large a model and how many tokens: scaling laws, with the cost of serving the model counted.

Hoffmann et al. (arXiv 2203.15556, approach 3) fit the loss of a model of N parameters after D
tokens as L = E + A/N^α + B/D^β. Least training FLOPs alone is Chinchilla's advice. The LLaMA paper
(arXiv 2302.13971, §1) argues that a smaller model trained for longer is cheaper to serve, so what
counts is 6·N·D for training and 2·N·T for the T tokens that it will read and write
(arXiv 2401.00448, equation 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megallama.config import ConfigError

#: FLOPs a parameter and token of training and of serving (arXiv 2001.08361).
TRAINING, SERVING = 6, 2
#: Bounds of a search for parameters, and the halvings of an interval that spend a float's digits.
FEWEST, MOST, HALVINGS = 1e3, 1e18, 200


@dataclass(frozen=True)
class Law:
    """L = e + a/N^alpha + b/D^beta, in nats a token of the text and tokenizer it was fitted on."""

    source: str
    e: float
    a: float
    alpha: float
    b: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """The loss of so many parameters after so many tokens."""
        return self.e + self.a / parameters**self.alpha + self.b / tokens**self.beta


#: Besiroglu et al. fitted the points of Hoffmann et al.'s figure again; the constants printed there
#: do not fit those points, nor that paper's own other two approaches.
LAWS: Mapping[str, Law] = MappingProxyType(
    {
        "besiroglu": Law("arXiv 2404.10102", 1.8172, 482.01, 0.3478, 2085.43, 0.3658),
        "hoffmann": Law("arXiv 2203.15556, approach 3", 1.69, 406.4, 0.34, 410.7, 0.28),
    }
)


@dataclass(frozen=True)
class Advice:
    """A model's parameters, the tokens to train it on, and what follows from them."""

    parameters: float
    tokens: float
    loss: float
    training_flops: float
    serving_flops: float

    @property
    def flops(self) -> float:
        """Of training and serving together."""
        return self.training_flops + self.serving_flops


def for_loss(law: Law, loss: float, served: float = 0.0) -> Advice:
    """The model of that loss that costs the fewest FLOPs, `served` tokens included.

    Where the derivative of 6·N·D + 2·N·T along the curve of equal loss is zero,
    (1 + T/(3·D))·β·B/D^β = α·A/N^α; the left falls in D, the right in N, and D falls in N.

    Raises:
        ConfigError: the law has no model of that loss.
    """
    if not law.loss(MOST, MOST) < loss < law.loss(FEWEST, FEWEST):
        raise ConfigError(
            f"a loss of {loss:g}: the law of {law.source} ends at {law.e:g}; give {law.e + 0.05:g} "
            f"to {law.e + 3:g}"
        )

    def tokens(parameters: float) -> float:
        return (law.b / (loss - law.e - law.a / parameters**law.alpha)) ** (1 / law.beta)

    def too_small(parameters: float) -> bool:
        if law.e + law.a / parameters**law.alpha >= loss:
            return True
        d = tokens(parameters)
        slope = (1 + served * SERVING / (TRAINING * d)) * law.beta * law.b / d**law.beta
        return slope < law.alpha * law.a / parameters**law.alpha

    parameters = _boundary(too_small)
    return _advice(law, parameters, tokens(parameters), served)


def for_flops(law: Law, flops: float, served: float = 0.0) -> Advice:
    """The model of the least loss whose training, and serving of `served` tokens, take the FLOPs.

    With D = C/(6·N) − T/3 the loss falls in N while β·B/D^β·(1 + T/(3·D)) < α·A/N^α.

    Raises:
        ConfigError: the FLOPs serve no model so often.
    """
    if not TRAINING * FEWEST < flops < TRAINING * MOST * MOST:
        raise ConfigError(f"{flops:g} FLOPs: train no model; give more GPU-hours")

    def tokens(parameters: float) -> float:
        return (flops / parameters - SERVING * served) / TRAINING

    def too_small(parameters: float) -> bool:
        d = tokens(parameters)
        if d <= 0:
            return False
        slope = (1 + served * SERVING / (TRAINING * d)) * law.beta * law.b / d**law.beta
        return slope < law.alpha * law.a / parameters**law.alpha

    parameters = _boundary(too_small)
    if tokens(parameters) < 1:
        raise ConfigError(
            f"{flops:g} FLOPs do not serve {served:g} tokens with any model; give fewer tokens to "
            "serve, or more GPU-hours"
        )
    return _advice(law, parameters, tokens(parameters), served)


def _boundary(too_small: Callable[[float], bool]) -> float:
    """The parameters from which on a model is no longer too small."""
    low, high = math.log(FEWEST), math.log(MOST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if too_small(math.exp(middle)) else (low, middle)
    return math.exp(high)


def _advice(law: Law, parameters: float, tokens: float, served: float) -> Advice:
    return Advice(
        parameters,
        tokens,
        law.loss(parameters, tokens),
        TRAINING * parameters * tokens,
        SERVING * parameters * served,
    )
