"""What one rank holds at the worst moment of a step, item by item, from the config alone.

Counted are the bytes of tensors, as an allocator is asked for them; what it rounds up, and what
libraries keep for themselves, is not (`train.memory` leaves room for that).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod

from megallama.config.schema import Config
from megallama.spec.buckets import buckets
from megallama.spec.grid import Grid, Place
from megallama.spec.groups import run_schedule
from megallama.spec.logits import CHUNK_BYTES, chunk_count, chunk_length
from megallama.spec.moments import Moments, Part, Unit
from megallama.spec.parameters import EMBEDDING, OUTPUT
from megallama.spec.saved import saved_bytes, weight_state_bytes
from megallama.spec.schedules.actions import Action, passes
from megallama.spec.shards import Shard, vocab_rows
from megallama.spec.stages import has_tied_copy, rank_tables
from megallama.spec.workspaces import Device, Workspaces

#: train.precision → bytes of a weight or activation.
ITEMSIZE = {"bf16": 2, "fp32": 4, "fp64": 8}
CPU = Device()
#: Bytes a rank under which a tensor travels packed with others on a CPU (`dist.parcels.ALONE`).
PACKED = 128 * 1024


def held_bytes(config: Config, grid: Grid, device: Device = CPU) -> dict[str, int]:
    """What the pipeline rank that holds the most holds, by item; see `rank_bytes`."""
    ranks = zip(grid.group("pipeline", 0), run_schedule(config, grid).actions, strict=True)
    every = [rank_bytes(config, Place(grid, rank), actions, device) for rank, actions in ranks]
    return max(every, key=lambda sizes: sum(sizes.values()))


def rank_bytes(
    config: Config, place: Place, actions: Sequence[Action], device: Device = CPU
) -> dict[str, int]:
    """Bytes of each item that a rank holds when it holds the most; items of none are left out.

    `actions`: the rank's list (`run_schedule`). `device`: kernels and collectives differ. First
    what is there all the time, then what the schedule keeps at that moment, then the workspace of
    the pass under way, which is named after the moment.
    """
    rank = _Rank(config, place, device)
    sizes = rank.state() | rank.buffers() | rank.moments().worst(actions)
    return {name: size for name, size in sizes.items() if size}


def kept_bytes(config: Config, place: Place, actions: Sequence[Action]) -> dict[str, int]:
    """The most that the layers of a rank keep at once, from F to B and from B to W.

    The two need not be at the same moment.
    """
    rank = _Rank(config, place, CPU)
    layers = {chunk.index: len(chunk.layers) for chunk in rank.chunks}
    saved, state = rank.a_layer()
    sizes = {"saved activations": peak_layers(actions, layers, "F", ("B", "BW")) * saved}
    if split := peak_layers(actions, layers, "B", ("W",)):
        sizes["saved from B to W"] = split * state
    return sizes


def peak_layers(
    actions: Sequence[Action], layers: Mapping[int, int], begin: str, ends: Collection[str]
) -> int:
    """The most layers of which sets are held at once; `layers`: of each chunk.

    A set is held from the pass of kind `begin` to the one of a kind in `ends`, both included: in a
    fused action the forward's is there before the backward's is gone.
    """
    held = peak = 0
    for one in passes(actions):
        if one.kind == begin:
            held += layers[one.chunk]
            peak = max(peak, held)
        elif one.kind in ends:
            held -= layers[one.chunk]
    return peak


class _Rank:
    """One rank's chunks and shards, and the numbers that its items are made of.

    `itemsize`: of a weight or activation; `wide`: of a gradient, a master or a moment; `sent`: of a
    gradient that travels. `tokens`: of a micro-batch.
    """

    def __init__(self, config: Config, place: Place, device: Device) -> None:
        self.config, self.grid, self.device = config, place.grid, device
        tables = rank_tables(config, place)
        self.chunks = [chunk for chunk, _ in tables]
        self.shards = [shard for _, shards in tables for shard in shards]
        self.buckets = [bucket for _, shards in tables for bucket in _buckets(shards)]
        self.itemsize = ITEMSIZE[config.train.precision]
        self.wide = max(self.itemsize, 4)
        self.rounds = config.parallel.gradient_wire == "bf16"
        self.sent = 2 if self.rounds else self.wide
        self.tokens = config.train.micro_batch * config.train.sequence_length

    def state(self) -> dict[str, int]:
        """Parameter buffers and moments."""
        parameters = _elements(self.shards)
        own = sum(prod(shard.own_shape) for shard in self.shards)
        sizes = {
            "weights": parameters * self.itemsize,
            "masters": own * self.wide if self.itemsize < self.wide else 0,
            "gradients": (parameters + self._second_gradient()) * self.wide,
            "moments": 2 * own * self.wide,
        }
        if self.config.parallel.early_step:
            sizes["kept for early_step"] = self._optimizer_state()
        return sizes

    def _optimizer_state(self) -> int:
        """This data rank's masters and moments."""
        return 3 * self.wide * sum(prod(shard.own_shape) for shard in self.shards)

    def _second_gradient(self) -> int:
        """Elements of a tied output projection's own gradient, where the embedding is on its
        rank."""
        if not self.config.model.tie_embeddings or has_tied_copy(self.config, self.grid):
            return 0
        return _elements([shard for shard in self.shards if shard.name == EMBEDDING])

    def buffers(self) -> dict[str, int]:
        """What passes and groups make once and keep."""
        model, tensor = self.config.model, self.grid.tensor
        length = self.config.train.sequence_length
        sizes = {"rotations": length * model.head_width * self.wide}
        if any(chunk.head for chunk in self.chunks):
            rows = vocab_rows(model.vocab, tensor)
            shape = self.tokens, rows, self.itemsize, CHUNK_BYTES[self.device.type]
            count = min(chunk_count(*shape), 2 if tensor > 1 else 1)
            sizes["logits"] = count * chunk_length(*shape) * rows * self.itemsize
        if self.device.type == "cpu":
            sizes["received parts of sums"] = self._received()
            save = self.config.checkpoint
            if save.asynchronous and save.every:
                sizes["copy for the save under way"] = self._optimizer_state()
        return sizes

    def _received(self) -> int:
        """What gloo groups receive and add up in: the other ranks' parts of each one's largest sum,
        and the sum in fp32 or wider, where two parts are not added as they are."""
        tensor, data, received = self.grid.tensor, self.grid.data, 0
        if tensor > 1:
            whole = self.tokens * self.config.model.d_model * self.itemsize
            received += (tensor - 1) * whole // tensor
            if tensor > 2 or self.itemsize < self.wide:
                received += whole // tensor // self.itemsize * self.wide
        if data > 1:
            largest = max(_elements(bucket) for bucket in self.buckets)
            received += (data - 1) * largest // data * self.sent
            if data > 2 or self.sent < self.wide:
                received += largest // data * self.wide
        if has_tied_copy(self.config, self.grid):  # two ranks, each with half of the sum
            own = sum(prod(shard.own_shape) for shard in self.shards if shard.name == EMBEDDING)
            received += own * self.wide // 2
        return received

    def a_layer(self) -> tuple[int, int]:
        """What a layer keeps of a micro-batch from F to B, and from B to W."""
        shape = (self.itemsize, self.tokens, self.grid.tensor)
        divided = self.config.parallel.sequence_parallel
        model, policy = self.config.model, self.config.train.saved_activations
        saved = saved_bytes(model, policy, *shape, sequence_parallel=divided)
        return saved, weight_state_bytes(model, *shape, sequence_parallel=divided)

    def moments(self) -> Moments:
        """What its passes keep and work with."""
        spaces = Workspaces(self.config, self.grid, self.itemsize, self.device)
        saved, state = self.a_layer()
        # Tokens and labels of 8 bytes, cosines and sines of half a head each.
        inputs = self.tokens * (2 * 8 + self.config.model.head_width * self.wide)
        output, layer = self._copies()
        overlap = self.config.parallel.overlap != "none"
        return Moments(
            {c.index: Part(len(c.layers), c.embedding, c.head) for c in self.chunks},
            Unit(saved, state, spaces.stream, inputs, output, layer),
            spaces,
            queued=overlap,
            fills=overlap and self.grid.tensor > 1,
            keeps_sent=self.device.type == "cuda",  # NCCL's handles: waited for at the step's end
        )

    def _copies(self) -> tuple[int, int]:
        """What is copied to sum the output projection's gradients over data ranks, and a layer's.

        What is rounded for the wire is; on a CPU so are small tensors, which travel together, and
        with three ranks or more a sum is made beside the parts.
        """
        sizes = {True: 0, False: 0}
        for bucket in self.buckets if self.grid.data > 1 else []:
            is_output = len(bucket) == 1 and bucket[0].name in (OUTPUT, EMBEDDING)
            sizes[is_output] = max(sizes[is_output], self._copied(bucket))
        return sizes[True], sizes[False]

    def _copied(self, bucket: Sequence[Shard]) -> int:
        ranks = self.grid.data
        if self.device.type != "cpu":  # what is sent and received, of two buckets at a time
            return 2 * 2 * _elements(bucket) * self.sent if self.rounds else 0
        packed = [s for s in bucket if prod(s.padded_shape) // ranks * self.sent < PACKED]
        copied = _elements(bucket if self.rounds else packed) * self.sent
        largest = max(prod(shard.own_shape) for shard in bucket)
        return copied + (largest * self.wide if ranks > 2 else 0)


def _buckets(table: Sequence[Shard]) -> list[list[Shard]]:
    """The shards of a chunk that travel together."""
    by_name = {shard.name: shard for shard in table}
    names = buckets([shard.parameter for shard in table])
    return [[by_name[name] for name in bucket] for bucket in names]


def _elements(shards: Sequence[Shard]) -> int:
    return sum(prod(shard.padded_shape) for shard in shards)
