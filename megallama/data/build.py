"""Builds a token file from a text corpus, on every core.

One process cuts the corpus into chunks and writes, the others parse and encode. Results are taken
in the order of the chunks, so the files do not depend on the number of workers.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megallama.data.documents import Chunk, decode_documents, read_chunks
from megallama.data.sidecar import Sidecar
from megallama.data.token_files import SMALL_VOCAB, TokenFileWriter
from megallama.data.tokenizer import SPACE_MARK, Tokenizer
from megallama.errors import ConfigError

CHUNKS_PER_WORKER = 4  # in flight: enough that no worker waits, few enough to bound memory


@dataclass(frozen=True)
class BuildReport:
    """What a build did. cut_files: .txt files so long that they became several documents."""

    sidecar: Sidecar
    empty_documents: int
    cut_files: int


@dataclass(frozen=True)
class Encoded:
    """A chunk's documents as tokens, one after the other, each from <s> to </s>."""

    lengths: npt.NDArray[np.int32]
    tokens: npt.NDArray[Any]
    empty: int
    with_u2581: int


def build(
    inputs: Sequence[Path],
    tokenizer: Path,
    prefix: Path,
    text_field: str = "text",
    workers: int | None = None,
    progress: Callable[[int], None] = lambda consumed: None,
) -> BuildReport:
    """Writes PREFIX.bin, .idx and .json from the documents of `inputs`, in their order.

    workers: processes that encode; None: one a core; 1: this process alone.
    progress: called with the bytes of input just finished.
    Raises ConfigError and CorruptError; nothing is left at `prefix` then.
    """
    workers = (os.cpu_count() or 1) if workers is None else workers
    if workers < 1:
        raise ConfigError(f"--workers {workers}: at least 1 is needed")
    encoder = Encoder(tokenizer, text_field)
    chunks = read_chunks(inputs, text_field)
    empty = with_u2581 = 0
    cut: set[Path] = set()
    with (
        TokenFileWriter(prefix, encoder.tokenizer.vocab_size) as writer,
        closing(_encode_all(chunks, encoder, workers)) as results,
    ):
        for chunk, encoded in results:
            writer.add(encoded.lengths, encoded.tokens)
            empty += encoded.empty
            with_u2581 += encoded.with_u2581
            if chunk.kind == "text" and chunk.offset > 0:
                cut.add(chunk.path)
            progress(chunk.consumed)
        if writer.documents == 0:
            raise ConfigError(f"no text in {', '.join(map(str, inputs))}: nothing to build")
        sidecar = writer.finish(encoder.tokenizer.hash, with_u2581)
    return BuildReport(sidecar, empty, len(cut))


class Encoder:
    """Turns chunks into tokens."""

    def __init__(self, tokenizer: Path, text_field: str) -> None:
        self.tokenizer = Tokenizer(tokenizer)
        self.text_field = text_field
        self.dtype = np.dtype(np.uint16 if self.tokenizer.vocab_size < SMALL_VOCAB else np.int32)

    def __call__(self, chunk: Chunk) -> Encoded:
        """Parses and encodes a chunk; documents without a character are dropped and counted."""
        lengths: list[int] = []
        documents: list[npt.NDArray[Any]] = []
        empty = with_u2581 = 0
        for text in decode_documents(chunk, self.text_field):
            if not text:
                empty += 1
                continue
            with_u2581 += SPACE_MARK in text
            ids = [self.tokenizer.bos, *self.tokenizer.encode(text), self.tokenizer.eos]
            lengths.append(len(ids))
            documents.append(np.array(ids, self.dtype))
        tokens = np.concatenate([np.empty(0, self.dtype), *documents])
        return Encoded(np.array(lengths, np.int32), tokens, empty, with_u2581)


def _encode_all(
    chunks: Iterable[Chunk], encoder: Encoder, workers: int
) -> Generator[tuple[Chunk, Encoded], None, None]:
    """Yields every chunk with its tokens, in order, with few chunks in memory at a time."""
    if workers == 1:
        yield from ((chunk, encoder(chunk)) for chunk in chunks)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),  # a fork copies the progress bar's locks
        initializer=_start_worker,
        initargs=(encoder.tokenizer.path, encoder.text_field),
    )
    pending: deque[tuple[Chunk, Future[Encoded]]] = deque()
    try:
        for chunk in chunks:
            pending.append((chunk, pool.submit(_encode_in_worker, chunk)))
            if len(pending) >= CHUNKS_PER_WORKER * workers:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    except BrokenProcessPool:
        raise ConfigError(
            "a worker process died, for lack of memory perhaps: try fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker_encoder: list[Encoder] = []  # of a worker process: loaded once, used for all its chunks


def _start_worker(tokenizer: Path, text_field: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_encoder.append(Encoder(tokenizer, text_field))


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
    os._exit(1)


def _encode_in_worker(chunk: Chunk) -> Encoded:
    return _worker_encoder[0](chunk)
