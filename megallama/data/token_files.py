"""Token files: Megatron's PREFIX.bin and PREFIX.idx, with our sidecar PREFIX.json.

.bin holds bare tokens, .idx says where documents lie (`token_index`). We write one sequence a
document.
"""

from __future__ import annotations

import bisect
import math
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from megallama.data.sidecar import BlockHasher, Sidecar, load_sidecar
from megallama.data.token_index import DTYPES, HEADER, MAGIC, IntArray, TokenIndex
from megallama.errors import ConfigError, CorruptError
from megallama.files import open_plain, partial_path, refuse_os_errors, sync, sync_path

SMALL_VOCAB = 65_500  # below it, tokens are u16
COPY_ROWS = 1 << 20


def with_suffix(prefix: str | Path, suffix: str) -> Path:
    """PREFIX + suffix: a prefix may have dots of its own."""
    return Path(f"{prefix}{suffix}")


class TokenFile:
    """The token file at `prefix`, open for reading. Start-up time and memory do not grow with it.

    Raises ConfigError for missing files, CorruptError for damage that headers, sizes or the
    sidecar's own hash show. Damage inside the blocks is `verify`'s to find.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.bin_path = with_suffix(prefix, ".bin")
        self.index = TokenIndex(with_suffix(prefix, ".idx"))
        self._bin = open_plain(self.bin_path)
        size = os.fstat(self._bin.fileno()).st_size
        if size != self.index.bin_bytes:
            raise CorruptError(
                f"{self.bin_path}: {size} bytes where {self.index.path.name} needs "
                f"{self.index.bin_bytes}: truncated or damaged"
            )
        self.tokens = size // self.index.dtype.itemsize
        self.documents = len(self.index.documents) - 1
        path = with_suffix(prefix, ".json")
        self.sidecar = load_sidecar(path)
        ours = (self.tokens, self.documents, self.index.dtype.name)
        if self.sidecar is not None:
            theirs = (self.sidecar.tokens, self.sidecar.documents, self.sidecar.dtype)
            if theirs != ours:
                raise CorruptError(
                    f"{path}: tokens, documents, dtype are {theirs}, but {ours} in "
                    f"{self.index.path.name}: the files are not of one build"
                )

    def read(self, start: int, length: int) -> IntArray:
        """Tokens [start, start + length) as a copy. Raises CorruptError where the file is cut."""
        if start < 0 or length < 0 or start + length > self.tokens:
            raise IndexError(f"tokens [{start}, {start + length}) of {self.tokens}")
        width = self.index.dtype.itemsize
        # A read, not a map: a failing disk is then an error to report and not a SIGBUS.
        with refuse_os_errors("read", self.bin_path):
            raw = os.pread(self._bin.fileno(), length * width, start * width)
        if len(raw) != length * width:
            raise CorruptError(f"{self.bin_path}: truncated at byte {start * width + len(raw)}")
        return np.frombuffer(raw, self.index.dtype).astype(np.int64)

    def document(self, number: int) -> IntArray:
        """The tokens of one document."""
        start = self.index.document_start(number)
        return self.read(start, self.index.document_start(number + 1) - start)

    def document_starts(self, start: int, length: int) -> IntArray:
        """Where documents begin in tokens [start, start + length), relative to `start`, ascending.

        A binary search over the index: log2(documents) short reads, 0.1 ms of 100 million.
        """
        numbers = range(self.documents)
        first = bisect.bisect_left(numbers, start, key=self.index.document_start)
        starts: list[int] = []
        for number in numbers[first:]:
            offset = self.index.document_start(number) - start
            if offset >= length:
                break
            if offset < (starts[-1] if starts else 0):
                raise CorruptError(f"{self.index.path}: document {number} starts out of order")
            if not starts or offset > starts[-1]:  # an empty document begins where the next does
                starts.append(offset)
        return np.array(starts, np.int64)

    @property
    def bytes_on_disk(self) -> int:
        """The size of PREFIX.bin."""
        return self.index.bin_bytes

    @property
    def fingerprint(self) -> str:
        """What tells this build from another: its count of tokens, and the sidecar's hashes."""
        hashes = "".join((*self.sidecar.xxh3_bin, *self.sidecar.xxh3_idx)) if self.sidecar else ""
        return f"{self.tokens} tokens, {xxhash.xxh3_64_hexdigest(hashes.encode())}"

    def close(self) -> None:
        """Closes the files of tokens and index."""
        self._bin.close()
        self.index.close()


class TokenFileWriter:
    """Writes the token file at `prefix` from a stream of documents; use it in a `with` block.

    Until `finish` returns, the files have temporary names, and PREFIX.idx, without which nothing
    opens, takes its name last. Memory does not grow with the file. Raises ConfigError where the
    system refuses.
    """

    def __init__(self, prefix: str | Path, vocab_size: int) -> None:
        self.bin, self.idx, self.json = (with_suffix(prefix, s) for s in (".bin", ".idx", ".json"))
        self.dtype = np.dtype("<u2" if vocab_size < SMALL_VOCAB else "<i4")
        self.tokens = self.documents = 0
        self._frequencies = np.zeros(vocab_size, np.int64)
        self._bin_hash, self._idx_hash = BlockHasher(), BlockHasher()
        self._lengths_path = partial_path(with_suffix(prefix, ".lengths"))
        with refuse_os_errors("write", self.bin):
            self.bin.parent.mkdir(parents=True, exist_ok=True)
            self._bin: BinaryIO = open(partial_path(self.bin), "wb")  # noqa: SIM115
            self._lengths: BinaryIO = open(self._lengths_path, "w+b")  # noqa: SIM115

    def __enter__(self) -> TokenFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        for file in (self._bin, self._lengths):
            with suppress(OSError):  # a full disk, said already
                file.close()
        for path in (*map(partial_path, (self.bin, self.idx, self.json)), self._lengths_path):
            path.unlink(missing_ok=True)

    def add(self, lengths: npt.NDArray[np.int32], tokens: npt.NDArray[Any]) -> None:
        """Appends whole documents: their lengths and their tokens, one after the other."""
        self._frequencies += np.bincount(tokens, minlength=len(self._frequencies))
        raw = np.ascontiguousarray(tokens, self.dtype).tobytes()
        self._bin_hash.update(raw)
        with refuse_os_errors("write", self.bin):
            self._bin.write(raw)
            self._lengths.write(lengths.astype("<i4").tobytes())
        self.tokens += len(tokens)
        self.documents += len(lengths)

    def finish(self, tokenizer_hash: str, documents_with_u2581: int) -> Sidecar:
        """Writes index and sidecar, and gives all three files their names."""
        with refuse_os_errors("write", self.idx):
            sync(self._bin)
            with open(partial_path(self.idx), "wb") as file:
                self._write_index(file)
                sync(file)
            sidecar = Sidecar(
                tokenizer_hash=tokenizer_hash,
                vocab_size=len(self._frequencies),
                tokens=self.tokens,
                documents=self.documents,
                dtype=self.dtype.name,
                unigram_entropy_nats=entropy_nats(self._frequencies),
                documents_with_u2581=documents_with_u2581,
                xxh3_bin=self._bin_hash.digests(),
                xxh3_idx=self._idx_hash.digests(),
            )
            with open(partial_path(self.json), "wb") as file:
                file.write(sidecar.dumps())
                sync(file)
            for old in (self.idx, self.json):  # an index never stands beside another build's tokens
                old.unlink(missing_ok=True)
            for path in (self.bin, self.json, self.idx):
                os.replace(partial_path(path), path)
            sync_path(self.idx.parent)
        return sidecar

    def _write_index(self, file: BinaryIO) -> None:
        code = next(code for code, name in DTYPES.items() if name == self.dtype.name)
        header = HEADER.pack(MAGIC, 1, code, self.documents, self.documents + 1)
        self._emit(file, header)
        self._lengths.seek(0)
        while raw := self._lengths.read(4 * COPY_ROWS):
            self._emit(file, raw)
        self._lengths.seek(0)
        end = 0
        while raw := self._lengths.read(4 * COPY_ROWS):
            ends = end + np.cumsum(np.frombuffer(raw, "<i4"), dtype="<i8") * self.dtype.itemsize
            self._emit(file, np.concatenate(([end], ends[:-1])).astype("<i8").tobytes())
            end = int(ends[-1])
        for first in range(0, self.documents + 1, COPY_ROWS):
            rows = np.arange(first, min(first + COPY_ROWS, self.documents + 1), dtype="<i8")
            self._emit(file, rows.tobytes())

    def _emit(self, file: BinaryIO, raw: bytes) -> None:
        file.write(raw)
        self._idx_hash.update(raw)


def entropy_nats(frequencies: IntArray) -> float:
    """-sum p ln p of the tokens counted in `frequencies`; 0 for none."""
    total = int(frequencies.sum())
    counts = frequencies[frequencies > 0].tolist()
    return math.fsum(-c / total * math.log(c / total) for c in counts)


def check_vocab(tokens: IntArray, vocab: int, place: str, start: int) -> None:
    """Raises CorruptError for a token outside [0, vocab); `start` is the offset of tokens[0]."""
    outside = (tokens < 0) | (tokens >= vocab)
    if outside.any():
        at = int(np.argmax(outside))
        raise CorruptError(
            f"{place}: token {int(tokens[at])} at offset {start + at} is outside the vocabulary "
            f"of {vocab}: the file is damaged, or of another tokenizer"
        )


def require_document(file: TokenFile, number: int) -> None:
    """Raises ConfigError unless `file` has document `number`."""
    if not 0 <= number < file.documents:
        raise ConfigError(
            f"{file.prefix}: no document {number}: they are 0 to {file.documents - 1}"
        )
