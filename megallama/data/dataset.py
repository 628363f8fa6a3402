"""Batches of token windows, as numpy arrays: what a step is given, for any range of samples.

Shapes: N samples, S tokens a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megallama.data.order import Phase, SampleOrder
from megallama.data.token_files import TokenFile, check_vocab
from megallama.data.token_index import IntArray
from megallama.data.verify import verify
from megallama.errors import ConfigError
from megallama.spec.labels import IGNORE

#: Token files up to this size are read and verified whole at every start, in under a second;
#: larger ones by `megallama data inspect`.
VERIFY_BYTES = 64 << 20

Weight = str | float | int
SourcePhase = tuple[int | None, Sequence[tuple[str, str | Path, Weight]]]


@dataclass(frozen=True)
class Batch:
    """N samples.

    tokens_NS: int64. labels_NS: the tokens that follow, or IGNORE.
    sources_N: of each sample, the index in Dataset.source_names.
    document_lengths: of each sample, the lengths of its pieces of documents, which sum to S:
        attention and positions start anew in each. None: documents are not told apart.
    """

    tokens_NS: IntArray
    labels_NS: IntArray
    sources_N: IntArray
    document_lengths: list[list[int]] | None

    def samples(self, first: int, end: int) -> Batch:
        """Those from `first` on, up to `end`: views."""
        rows, documents = slice(first, end), self.document_lengths
        arrays = self.tokens_NS[rows], self.labels_NS[rows], self.sources_N[rows]
        return Batch(*arrays, None if documents is None else documents[rows])


class Dataset:
    """The samples of a run.

    phases: (until_tokens or None, [(source name, prefix of its token file, weight)]).
    vocab: V of the model; a file's own vocabulary may be smaller.
    mask_documents: nothing is learned or seen across the border of two documents.
    tokenizer_hash: of the tokenizer that the files must be made with; None: only of one tokenizer.
    Raises ConfigError and CorruptError.
    """

    def __init__(
        self,
        phases: Sequence[SourcePhase],
        sequence_length: int,
        seed: int,
        vocab: int,
        mask_documents: bool = False,
        validation_sequences: int = 0,
        tokenizer_hash: str | None = None,
    ) -> None:
        paths = _paths(phases)
        files = {name: TokenFile(path) for name, path in paths.items()}
        _check_vocabularies(files, vocab)
        _check_tokenizers(files, tokenizer_hash)
        for file in files.values():
            if file.bytes_on_disk <= VERIFY_BYTES:
                verify(file)
        self.order = SampleOrder(
            {name: file.tokens for name, file in files.items()},
            [Phase(until, {name: w for name, _, w in sources}) for until, sources in phases],
            sequence_length,
            seed,
            validation_sequences,
        )
        self.source_names = self.order.source_names
        self.sequence_length = sequence_length
        self.vocab = vocab
        self.mask_documents = mask_documents
        self.tokenizer_hash = tokenizer_hash
        #: Sources whose bytes were not held against hashes: no sidecar, or too large to do so here.
        self.unverified = [
            name
            for name, file in files.items()
            if file.sidecar is None or file.bytes_on_disk > VERIFY_BYTES
        ]
        self.fingerprints = {name: file.fingerprint for name, file in files.items()}
        self._files = [files[name] for name in self.source_names]

    def batch(self, first_sample: int, count: int) -> Batch:
        """Training samples [first_sample, first_sample + count)."""
        where = self.order.locate(np.arange(first_sample, first_sample + count))
        return self._read(where.source, where.window)

    def validation_batch(self, source: int, first: int, count: int) -> Batch:
        """Held-out samples [first, first + count) of a source; each has `validation_sequences`."""
        windows = self.order.validation_windows(source, np.arange(first, first + count))
        return self._read(np.full(count, source, np.int64), windows)

    def _read(self, sources_N: IntArray, windows_N: IntArray) -> Batch:
        N, S = len(sources_N), self.sequence_length
        tokens_NS, labels_NS = np.empty((N, S), np.int64), np.empty((N, S), np.int64)
        lengths: list[list[int]] = []
        for n, (source, window) in enumerate(zip(sources_N.tolist(), windows_N, strict=True)):
            file, start = self._files[source], int(window) * S
            tokens = file.read(start, S + 1)
            check_vocab(tokens, self.vocab, str(file.bin_path), start)
            tokens_NS[n], labels_NS[n] = tokens[:-1], tokens[1:]
            if self.mask_documents:
                starts = file.document_starts(start + 1, S) + 1  # in [1, S]
                labels_NS[n, starts - 1] = IGNORE
                borders = [0, *starts[starts < S].tolist(), S]
                lengths.append(np.diff(borders).tolist())
        return Batch(tokens_NS, labels_NS, sources_N, lengths if self.mask_documents else None)


def _paths(phases: Sequence[SourcePhase]) -> dict[str, Path]:
    """The file of each source. Raises ConfigError unless names and files pair one to one."""
    path_of: dict[str, Path] = {}
    name_of: dict[Path, str] = {}
    for number, (_, sources) in enumerate(phases):
        names = [name for name, _, _ in sources]
        for name, prefix, _ in sources:
            path = Path(prefix)
            if names.count(name) > 1:
                raise ConfigError(f"data phase {number}: source {name!r} is named twice")
            if path_of.setdefault(name, path) != path:
                raise ConfigError(f"data source {name!r} is both {path_of[name]} and {path}")
            if name_of.setdefault(path.resolve(), name) != name:  # one would train on the other's
                raise ConfigError(  # held-out samples
                    f"data sources {name_of[path.resolve()]!r} and {name!r} are the same "
                    f"file, {path}: name it once"
                )
    return path_of


def _check_vocabularies(files: dict[str, TokenFile], vocab: int) -> None:
    for file in files.values():
        if file.sidecar is not None and file.sidecar.vocab_size > vocab:
            raise ConfigError(
                f"{file.prefix}: its tokenizer has {file.sidecar.vocab_size} tokens, the model's "
                f"vocabulary only {vocab}: raise the model's"
            )


def _check_tokenizers(files: dict[str, TokenFile], tokenizer_hash: str | None) -> None:
    """Raises ConfigError unless all files that say so are of one tokenizer: the given one."""
    wanted, by = tokenizer_hash, "data.tokenizer"
    for file in files.values():
        if file.sidecar is None:
            continue
        if wanted is None:
            wanted, by = file.sidecar.tokenizer_hash, file.prefix
        if file.sidecar.tokenizer_hash != wanted:
            raise ConfigError(
                f"{file.prefix} was built with tokenizer {file.sidecar.tokenizer_hash}, but {by} "
                f"is {wanted}: build it with that tokenizer, or give the other"
            )
