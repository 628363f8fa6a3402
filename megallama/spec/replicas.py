"""What a comparison of replicas sends (`train.replicas`): a checksum of everything held alike."""

from __future__ import annotations

from itertools import chain

from megallama.config.schema import Config
from megallama.spec.collectives import Traffic, all_gather
from megallama.spec.grid import Place
from megallama.spec.groups import TIED
from megallama.spec.parameters import EMBEDDING
from megallama.spec.stages import has_tied_copy, rank_tables

#: Bytes of a checksum.
CHECKSUM = 8
#: What an optimizer's rows are in: masters and two moments.
STATES = 3


def comparison_traffic(config: Config, place: Place) -> Traffic:
    """What the rank at `place` sends: over the data ranks, checksums of every parameter's weights;
    over the tensor ranks, of the masters and moments of norms and of shared key/value heads; over
    a tied embedding's two ends, of the embedding's."""
    grid = place.grid
    table = tuple(chain.from_iterable(shards for _, shards in rank_tables(config, place)))
    total = all_gather("data", grid.data, len(table) * CHECKSUM)
    if shared := sum(piece.copies > 1 for shard in table for piece in shard.own_pieces):
        total += all_gather("tensor", grid.tensor, STATES * shared * CHECKSUM)
    if has_tied_copy(config, grid) and any(shard.name == EMBEDDING for shard in table):
        total += all_gather(TIED, 2, STATES * CHECKSUM)
    return total
