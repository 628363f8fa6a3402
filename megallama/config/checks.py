"""Values that are right on their own and do not fit together.

Each check takes the values named beside it in `CHECKS` and yields a fault for each contradiction.
It runs whenever those values are valid, whatever else is wrong, so that one try shows every fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import isqrt
from typing import Any

from megallama.config.data_checks import phases_in_order, sources_alike
from megallama.config.faults import Fault, at
from megallama.config.schedules import VIRTUAL_STAGES, default_virtual_stages
from megallama.config.schema import (
    Profile,
    RopeScaling,
    Spike,
    steps_of,
)

Faults = Iterator[Fault]


def cross_check(valid: Mapping[str, Any]) -> Faults:
    """The faults among `valid`, the values by `section.key` that are right on their own."""
    for check, keys in CHECKS:
        if all(key in valid for key in keys.split()):
            yield from check(*(valid[key] for key in keys.split()))


def _divisors(n: int) -> set[int]:
    small = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return {*small, *(n // d for d in small)}


def _nearest(value: int, fitting: Iterable[int]) -> str:
    """`12 or 16`: the nearest fitting numbers below and above."""
    below = [n for n in fitting if n < value]
    above = [n for n in fitting if n > value]
    return " or ".join(str(n) for n in (*sorted(below)[-1:], *sorted(above)[:1]))


def _multiples(value: int, unit: int) -> str:
    return _nearest(value, {value // unit * unit, (value // unit + 1) * unit} - {0})


def _head_width(d_model: int, heads: int) -> Faults:
    if d_model % heads:
        wrong = f"does not divide model.d_model={d_model}"
    elif d_model // heads % 2:
        wrong = f"gives heads of odd width {d_model // heads}, and RoPE turns pairs"
    else:
        return
    if d_model % 2:
        remedy = "make model.d_model even"
    else:
        remedy = f"the nearest that fits is {_nearest(heads, _divisors(d_model // 2))}"
    yield Fault(at("model.heads", heads), wrong, remedy)


def _kv_heads(heads: int, kv_heads: int) -> Faults:
    if heads % kv_heads:
        yield Fault(
            at("model.kv_heads", kv_heads),
            f"does not divide model.heads={heads}",
            f"the nearest that divides is {_nearest(kv_heads, _divisors(heads))}",
        )


def _tensor_splits_heads(heads: int, tensor: int) -> Faults:
    yield from _tensor_splits("model.heads", heads, tensor)


def _tensor_splits_ffn(ffn: int, tensor: int) -> Faults:
    yield from _tensor_splits("model.ffn", ffn, tensor)


def _tensor_splits(key: str, size: int, tensor: int) -> Faults:
    if size % tensor:
        yield Fault(
            at("parallel.tensor", tensor),
            f"does not divide {key}={size}",
            f"the nearest that divides is {_nearest(tensor, _divisors(size))}",
        )


def _tensor_splits_kv_heads(kv_heads: int, tensor: int) -> Faults:
    if kv_heads % tensor and tensor % kv_heads:
        fitting = _divisors(kv_heads) | {tensor // kv_heads * kv_heads}
        yield Fault(
            at("parallel.tensor", tensor),
            f"neither divides model.kv_heads={kv_heads} nor is a multiple of it",
            f"the nearest that fits is {_nearest(tensor, fitting - {0})}",
        )


def _tensor_splits_sequence(
    sequence_length: int, tensor: int, sequence_parallel: bool, overlap: str
) -> Faults:
    if tensor == 1:
        return
    chunks = 2 if overlap == "full" else 1
    unit = chunks * (tensor if sequence_parallel else 1)
    if sequence_length % unit:
        without = sequence_parallel and sequence_length % chunks == 0
        why = f"parallel.tensor={tensor}" if sequence_parallel else ""
        if chunks == 2:
            why = " x ".join(filter(None, [why, "the 2 chunks of parallel.overlap=full"]))
        yield Fault(
            at("train.sequence_length", sequence_length),
            f"is not a multiple of {why}",
            f"the nearest that fits is {_multiples(sequence_length, unit)}"
            + (", or set parallel.sequence_parallel=false" if without else ""),
        )


def _virtual_stages(schedule: str, virtual_stages: int | None) -> Faults:
    takes = VIRTUAL_STAGES[schedule]
    if takes and virtual_stages and virtual_stages != takes:
        fused = "-fused" if schedule.endswith("-fused") else ""
        yield Fault(
            at("parallel.virtual_stages", virtual_stages),
            f"parallel.schedule={schedule} takes {takes}",
            f"leave it out, or set parallel.schedule=interleaved{fused}",
        )


def _chunks_have_layers(
    layers: int, pipeline: int, schedule: str, virtual_stages: int | None
) -> Faults:
    each = virtual_stages or default_virtual_stages(schedule)
    if pipeline * each > layers:
        fits = layers // each
        more = f"raise model.layers to {pipeline * each}, or have fewer chunks on a rank"
        yield Fault(
            at("parallel.pipeline", pipeline),
            f"x {each} {'chunk' if each == 1 else 'chunks'} on a rank exceeds "
            f"model.layers={layers}, and a chunk has one layer or more",
            f"the nearest that fits is {fits}" if fits else more,
        )


def _stage_layers(
    layers: int,
    pipeline: int,
    schedule: str,
    virtual_stages: int | None,
    stage_layers: str | tuple[int, ...],
) -> Faults:
    chunks = pipeline * (virtual_stages or default_virtual_stages(schedule))
    if isinstance(stage_layers, str) or chunks > layers:
        return
    remedy = f"give {chunks} that sum to {layers}, or use cost or even"
    subject = at("parallel.stage_layers", list(stage_layers))
    if len(stage_layers) != chunks:
        wrong = f"has {len(stage_layers)} {'entry' if len(stage_layers) == 1 else 'entries'}"
        yield Fault(subject, f"{wrong} for {chunks} {'chunk' if chunks == 1 else 'chunks'}", remedy)
    elif sum(stage_layers) != layers:
        yield Fault(subject, f"sums to {sum(stage_layers)}, not model.layers={layers}", remedy)


def _batch(global_batch: int, micro_batch: int, data: int | None) -> Faults:
    unit = micro_batch * (data or 1)
    if global_batch % unit:
        ranks = f" x parallel.data={data}" if data else ""
        yield Fault(
            at("train.global_batch", global_batch),
            f"is not a multiple of train.micro_batch={micro_batch}{ranks}",
            f"the nearest that fits is {_multiples(global_batch, unit)}",
        )


def _length(steps: int | None, tokens: int | None) -> Faults:
    if steps and tokens:
        yield Fault(
            at("train.steps", steps), f"given with train.tokens={tokens}", "set one to null"
        )
    if not steps and not tokens:
        yield Fault("train.steps", "is missing, and so is train.tokens", "set one of them")


def _profile(
    steps: int | None,
    tokens: int | None,
    sequence_length: int,
    global_batch: int,
    profile: Profile | None,
) -> Faults:
    total = steps or steps_of(tokens or 0, sequence_length, global_batch)
    if profile and 0 < total < profile.start:
        yield Fault(
            at("train.profile.start", profile.start),
            f"exceeds the run's {total} steps",
            f"give at most {total}",
        )


def _spike(spike: Spike | None, every: int, keep: int) -> Faults:
    if spike is None:
        return
    if not every:
        yield Fault(
            "train.spike",
            "goes back to a checkpoint, and checkpoint.every=0 writes none",
            "set checkpoint.every, or leave train.spike out",
        )
        return
    reach, enough = (keep - 1) * every + 1, -(-(spike.rewind - 1) // every) + 1
    if spike.rewind > reach:
        yield Fault(
            at("train.spike.rewind", spike.rewind),
            f"is more than checkpoint.keep={keep} every {every} steps are sure to reach back",
            f"give at most {reach}, or raise checkpoint.keep to {enough}",
        )


def _rates(lr: float, min_lr: float) -> Faults:
    if min_lr > lr:
        yield Fault(
            at("optimizer.min_lr", min_lr),
            f"is above optimizer.lr={lr}",
            f"give at most {lr}, or leave it out for a tenth of that",
        )


def _decay(
    steps: int | None,
    tokens: int | None,
    sequence_length: int,
    global_batch: int,
    decay_steps: int | None,
) -> Faults:
    total = steps or steps_of(tokens or 0, sequence_length, global_batch)
    if not total:
        return  # neither was given: `_length` says so
    if decay_steps and decay_steps > total:
        yield Fault(
            at("optimizer.decay_steps", decay_steps),
            f"exceeds the run's {total} steps",
            f"give at most {total}",
        )


def _wsd(schedule: str, decay_steps: int | None) -> Faults:
    if schedule == "wsd" and not decay_steps:
        yield Fault(
            at("optimizer.schedule", schedule),
            "needs optimizer.decay_steps",
            "set it to the length of the final decay, such as a tenth of the run's steps",
        )
    if schedule != "wsd" and decay_steps:
        yield Fault(
            at("optimizer.decay_steps", decay_steps),
            f"is not used by optimizer.schedule={schedule}",
            "remove it or use the wsd schedule",
        )


def _rope_scaling(scaling: RopeScaling | None) -> Faults:
    if scaling and scaling.high_freq_factor <= scaling.low_freq_factor:
        yield Fault(
            at("model.rope_scaling.high_freq_factor", scaling.high_freq_factor),
            f"is not above low_freq_factor={scaling.low_freq_factor}",
            "Llama 3.1 has 4 above 1",
        )


CHECKS: tuple[tuple[Callable[..., Faults], str], ...] = (
    (_head_width, "model.d_model model.heads"),
    (_kv_heads, "model.heads model.kv_heads"),
    (_rope_scaling, "model.rope_scaling"),
    (_tensor_splits_heads, "model.heads parallel.tensor"),
    (_tensor_splits_kv_heads, "model.kv_heads parallel.tensor"),
    (_tensor_splits_ffn, "model.ffn parallel.tensor"),
    (
        _tensor_splits_sequence,
        "train.sequence_length parallel.tensor parallel.sequence_parallel parallel.overlap",
    ),
    (_virtual_stages, "parallel.schedule parallel.virtual_stages"),
    (
        _chunks_have_layers,
        "model.layers parallel.pipeline parallel.schedule parallel.virtual_stages",
    ),
    (
        _stage_layers,
        "model.layers parallel.pipeline parallel.schedule parallel.virtual_stages "
        "parallel.stage_layers",
    ),
    (_batch, "train.global_batch train.micro_batch parallel.data"),
    (_length, "train.steps train.tokens"),
    (_profile, "train.steps train.tokens train.sequence_length train.global_batch train.profile"),
    (_spike, "train.spike checkpoint.every checkpoint.keep"),
    (_rates, "optimizer.lr optimizer.min_lr"),
    (
        _decay,
        "train.steps train.tokens train.sequence_length train.global_batch optimizer.decay_steps",
    ),
    (_wsd, "optimizer.schedule optimizer.decay_steps"),
    (phases_in_order, "data.mixture data.phases"),
    (sources_alike, "data.mixture data.phases"),
)
