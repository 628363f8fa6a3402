"""Scaling-law advice against closed forms, brute force and the papers' own figures."""

from __future__ import annotations

import numpy as np
import pytest

from megallama.errors import ConfigError
from megallama.plan.advice import LAWS, Law, for_flops, for_loss

NAMES = list(LAWS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("loss", [2.0, 2.3, 3.0])
def test_the_cheapest_to_train_has_a_closed_form(name: str, loss: float) -> None:
    """Without serving, of what is left above E the parameters' part is β/(α+β)."""
    law = LAWS[name]
    left, both = loss - law.e, law.alpha + law.beta
    parameters = (law.a * both / (law.beta * left)) ** (1 / law.alpha)
    tokens = (law.b * both / (law.alpha * left)) ** (1 / law.beta)
    found = for_loss(law, loss)
    assert found.parameters == pytest.approx(parameters, rel=1e-9)
    assert found.tokens == pytest.approx(tokens, rel=1e-9)
    assert found.loss == pytest.approx(loss)
    assert found.training_flops == pytest.approx(6 * parameters * tokens)
    assert found.serving_flops == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_best_for_a_budget_has_a_closed_form(name: str) -> None:
    """Hoffmann et al., equation 4."""
    law, flops = LAWS[name], 5.76e23
    a, b = law.beta / (law.alpha + law.beta), law.alpha / (law.alpha + law.beta)
    g = (law.alpha * law.a / (law.beta * law.b)) ** (1 / (law.alpha + law.beta))
    found = for_flops(law, flops)
    assert found.parameters == pytest.approx(g * (flops / 6) ** a, rel=1e-9)
    assert found.tokens == pytest.approx((flops / 6) ** b / g, rel=1e-9)


@pytest.mark.parametrize("served", [1e11, 2e12, 1e14])
def test_serving_against_every_size_on_a_grid(served: float) -> None:
    law, loss = LAWS["besiroglu"], 2.1
    found = for_loss(law, loss, served)
    sizes = np.geomspace(found.parameters / 5, found.parameters * 5, 20001)
    left = loss - law.e - law.a / sizes**law.alpha
    sizes, left = sizes[left > 0], left[left > 0]
    tokens = (law.b / left) ** (1 / law.beta)
    flops = 6 * sizes * tokens + 2 * sizes * served
    assert found.flops <= flops.min() * (1 + 1e-9)
    assert found.parameters == pytest.approx(sizes[flops.argmin()], rel=1e-3)

    budget = for_flops(law, found.flops, served)  # the dual
    assert budget.loss == pytest.approx(loss, rel=1e-9)
    assert budget.parameters == pytest.approx(found.parameters, rel=1e-6)
    assert budget.flops == pytest.approx(found.flops, rel=1e-9)


def test_the_more_is_served_the_smaller_the_model() -> None:
    law = LAWS["besiroglu"]
    models = [for_loss(law, 2.1, served) for served in (0, 1e11, 1e12, 1e13, 1e14)]
    sizes = [one.parameters for one in models]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0] / 3
    tokens = [one.tokens for one in models]
    assert tokens == sorted(tokens)


def test_published_advice() -> None:
    """Chinchilla's budget: 70B and 1.4T tokens by Besiroglu et al.'s constants, about 20 tokens a
    parameter, and with Hoffmann et al.'s own far fewer parameters than 67B (arXiv 2404.10102)."""
    found = for_flops(LAWS["besiroglu"], 5.76e23)
    assert 15 < found.tokens / found.parameters < 25
    assert 60e9 < found.parameters < 80e9
    assert for_flops(LAWS["hoffmann"], 5.76e23).parameters < 45e9
    assert LAWS["besiroglu"].loss(70e9, 1.4e12) == pytest.approx(1.97, abs=0.01)


@pytest.mark.parametrize("loss", [1.0, 1.8172, 1e9])
def test_a_loss_that_cannot_be_is_one_line(loss: float) -> None:
    with pytest.raises(
        ConfigError, match=r"the law of arXiv 2404\.10102 ends at 1\.8172"
    ) as caught:
        for_loss(LAWS["besiroglu"], loss)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flops, served", [(1.0, 0.0), (1e40, 0.0), (1e20, 1e29)])
def test_a_budget_that_cannot_be_is_one_line(flops: float, served: float) -> None:
    with pytest.raises(ConfigError, match="FLOPs") as caught:
        for_flops(LAWS["besiroglu"], flops, served)
    assert "\n" not in str(caught.value)


def test_a_law_is_its_formula() -> None:
    assert Law("", 1.0, 8.0, 1 / 3, 9.0, 0.5).loss(64, 81) == pytest.approx(1 + 2 + 1)
