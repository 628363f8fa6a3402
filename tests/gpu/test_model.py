"""A small model's training steps in bf16 on a GPU against the CPU's fp64, and twice the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megallama.config import parse_config
from megallama.spec.grid import ALONE
from megallama.train.bench import batches
from megallama.train.build import Trainer, build_trainer
from tests.gpu.models import SHAPES, assert_as_good, bf16_weights, build_model
from tests.harness import forward_backward, model_config, parts
from tests.reference import Batch, Shape, plain, random_batch

RATE, BETAS, EPS, DECAY, CLIP, STEPS = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0, 3


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_loss_logits_and_every_gradient(device, shape):
    """Two samples, one of several documents."""
    weights = bf16_weights(shape)
    tokens, labels, _ = random_batch(shape, 2, 150)
    lengths = [[150], [100, 1, 49]]
    truth = plain.forward_backward(shape, weights, tokens, labels, document_lengths=lengths)
    on_device = {name: w.to(device) for name, w in weights.items()}
    batch = Batch(tokens.to(device), labels.to(device), lengths)
    naive = plain.forward_backward(shape, on_device, *batch[:2], torch.bfloat16, lengths)
    ours = forward_backward(build_model(shape, weights, device, "linear_outputs"), batch)
    assert_as_good(ours.logits, naive.logits, truth.logits, "logits")
    for name, gradient in ours.grads.items():
        assert_as_good(gradient, naive.grads[name], truth.grads[name], name)
    # A sum of three hundred losses: the naive one's may be right by chance.
    assert abs(float(ours.loss) / float(truth.loss) - 1) <= torch.finfo(torch.bfloat16).eps


def make_trainer(shape: Shape, **train: Any) -> Trainer:
    """In bf16, of two micro-batches a step."""
    train |= dict(steps=STEPS, sequence_length=128, global_batch=4, micro_batch=2, precision="bf16")
    optimizer = dict(lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY, grad_clip=CLIP)
    model = model_config(shape).model_dump(mode="json")
    return build_trainer(parse_config({"model": model, "train": train, "optimizer": optimizer}))


def train_ours(trainer: Trainer) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and the masters after the steps."""
    batch_of = batches(trainer.config, None, ALONE)
    results = [trainer.step.run(batch_of(step), RATE) for step in range(STEPS)]
    assert all(result.applied for result in results)
    state = trainer.model.state
    return [result.loss for result in results], parts(state, state.masters)


def train_plainly(
    shape: Shape, trainer: Trainer, start: dict[str, Tensor], dtype: torch.dtype
) -> tuple[list[float], dict[str, Tensor]]:
    """The same steps by autograd in `dtype` and torch's AdamW on masters where `start` lies."""
    masters = {name: w.clone() for name, w in start.items()}
    matrices, vectors = (
        [w for w in masters.values() if (w.dim() > 1) == wanted] for wanted in (True, False)
    )
    groups = [dict(params=matrices, weight_decay=DECAY), dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPS)
    losses, batch_of = [], batches(trainer.config, None, ALONE)
    for step in range(STEPS):
        batch = batch_of(step)
        device = next(iter(masters.values())).device
        tokens, labels = (
            torch.from_numpy(x).to(device) for x in (batch.tokens_NS, batch.labels_NS)
        )
        # Rounded to bf16 by all: the truth is that of training in bf16 without its rounding errors.
        weights = {name: w.bfloat16() for name, w in masters.items()}
        result = plain.forward_backward(shape, weights, tokens, labels, dtype, reduction="mean")
        losses.append(float(result.loss))
        for name, master in masters.items():
            master.grad = result.grads[name].to(master.dtype)
        torch.nn.utils.clip_grad_norm_(list(masters.values()), CLIP)
        optimizer.step()
    return losses, masters


def test_three_training_steps(device):
    shape = SHAPES["heads of 64"]
    trainer = make_trainer(shape)
    assert trainer.device == device
    state = trainer.model.state
    start = {name: w.clone() for name, w in parts(state, state.masters).items()}
    truth = {name: w.double().cpu() for name, w in start.items()}
    true_losses, true_masters = train_plainly(shape, trainer, truth, torch.float64)
    _, naive_masters = train_plainly(shape, trainer, start, torch.bfloat16)
    losses, masters = train_ours(trainer)
    assert losses == pytest.approx(true_losses, rel=torch.finfo(torch.bfloat16).eps)
    found, naive, true = (
        changes({name: w.double().cpu() - truth[name] for name, w in after.items()})
        for after in (masters, naive_masters, true_masters)
    )
    for name, change in found.items():
        assert_as_good(change, naive[name], true[name], name)


def changes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every matrix, and the norms' vectors as one: of few elements, chance decides which of two
    roundings is the luckier (an early AdamW update is about the sign of the gradient)."""
    vectors = [x for x in tensors.values() if x.dim() == 1]
    return {name: x for name, x in tensors.items() if x.dim() > 1} | {"norms": torch.cat(vectors)}


def test_deterministic_steps_are_the_same_bits_twice(device):
    shape = SHAPES["heads of 128"]
    runs = [train_ours(make_trainer(shape, deterministic=True)) for _ in range(2)]
    (losses, masters), (again, masters_again) = runs
    assert losses == again
    assert all(torch.equal(master, masters_again[name]) for name, master in masters.items())
