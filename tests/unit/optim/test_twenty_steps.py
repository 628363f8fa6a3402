"""Twenty steps beside a plain PyTorch loop: transformers' LLaMA, torch.optim.AdamW, fp64."""

from __future__ import annotations

import pytest

from megallama.optim.schedule import learning_rate
from tests.harness import parts
from tests.reference import Batch, Shape, huggingface, random_batch, random_weights, relative_error
from tests.unit.optim.trainers import build_step, optimizer_config, step_batch

STEPS, CLIP = 20, 2.5
CONFIG = optimizer_config(
    lr=3e-3, min_lr=3e-4, warmup_steps=4, schedule="cosine", grad_clip=CLIP, weight_decay=0.2
)


def batches_of(shape):
    """Of each: six samples, many labels ignored in some, documents in one."""
    batches = [random_batch(shape, 6, 9, seed, 0.3 * seed) for seed in range(3)]
    tokens, labels, _ = random_batch(shape, 6, 9, 3)
    documents = [[4, 5], [9], [1, 7, 1], [9], [3, 3, 3], [8, 1]]
    return [*batches, Batch(tokens, labels, documents)]


@pytest.mark.parametrize("micro_batch", [2, 3, 6])
@pytest.mark.parametrize("shape", [Shape(), Shape(tie_embeddings=True)], ids=["untied", "tied"])
def test_twenty_steps(shape, micro_batch):
    """Losses, norms and the last weights; the clip is active on some steps and not on others."""
    weights, batches = random_weights(shape), batches_of(shape)
    settings = huggingface.AdamW(
        lambda step: learning_rate(CONFIG, step + 1, STEPS),
        betas=CONFIG.betas,
        eps=CONFIG.eps,
        weight_decay=CONFIG.weight_decay,
        clip=CLIP,
    )
    theirs = huggingface.adamw_loop(shape, weights, batches, STEPS, settings)
    clipped = [norm > CLIP for norm in theirs.grad_norms]
    assert any(clipped)
    assert not all(clipped)
    assert theirs.losses[-1] < theirs.losses[3] - 0.2, "it learns"

    step = build_step(shape, weights, micro_batch, CONFIG)
    ours = [
        step.run(step_batch(batches[n % len(batches)]), learning_rate(CONFIG, n + 1, STEPS))
        for n in range(STEPS)
    ]
    assert all(result.applied for result in ours)
    assert [result.loss for result in ours] == pytest.approx(theirs.losses, rel=1e-10)
    assert [result.grad_norm for result in ours] == pytest.approx(theirs.grad_norms, rel=1e-10)
    state = step.model.state
    for name, master in parts(state, state.masters).items():
        assert relative_error(master, theirs.weights[name]) < 1e-10, name
