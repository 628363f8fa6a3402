"""Text corpora read as documents: .txt, .jsonl (plain, .gz, .zst) and .parquet.

Reading has two halves, so that parsing can run on every core. `read_chunks` (one process) cuts the
files into chunks of about 1 MiB of raw bytes; `decode_documents` (any process) turns a chunk into
texts. Memory is bounded by the chunk, however large the files are.
"""

from __future__ import annotations

import gzip
import importlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from megallama.errors import ConfigError, CorruptError
from megallama.files import refuse_os_errors

CHUNK_BYTES = 1 << 20
WHOLE_TEXT_BYTES = 8 << 20  # a longer .txt is cut at line ends into documents of about CHUNK_BYTES
MAX_LINE_BYTES = 256 << 20  # of a .jsonl: one document
READ_BYTES = 64 << 10

Kind = Literal["text", "jsonl", "row"]


@dataclass(frozen=True)
class Chunk:
    """Some consecutive documents of one file, not parsed yet.

    number: of the first item, a line of a .jsonl or a row of a .parquet, counted from 1.
    offset: of the first item in bytes, in the decompressed file (0 for rows).
    consumed: bytes of the file on disk that this chunk used up, for a progress bar.
    """

    path: Path
    kind: Kind
    items: list[bytes | None]
    number: int
    offset: int
    consumed: int


def check_inputs(paths: Sequence[Path]) -> int:
    """Returns the bytes on disk of all `paths`.

    Raises ConfigError for a file that is not there or of no known kind.
    """
    total = 0
    for path in paths:
        if not path.name.endswith((".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")):
            raise ConfigError(
                f"{path}: unknown kind of corpus; give .txt, .jsonl, .jsonl.gz, .jsonl.zst "
                "or .parquet"
            )
        with refuse_os_errors("read", path), open(path, "rb"):
            total += os.path.getsize(path)
    return total


def read_chunks(paths: Sequence[Path], text_field: str) -> Iterator[Chunk]:
    """Yields the chunks of `paths` in order. Raises ConfigError and CorruptError."""
    check_inputs(paths)
    for path in paths:
        with refuse_os_errors("read", path):
            if path.suffix == ".parquet":
                yield from _parquet_chunks(path, text_field)
            elif path.suffix == ".txt":
                yield from _text_chunks(path)
            else:
                yield from _jsonl_chunks(path)


def decode_documents(chunk: Chunk, text_field: str) -> Iterator[str]:
    """Yields the texts of a chunk.

    Raises CorruptError for bytes that are not UTF-8 (naming their offset) and for lines that are
    not JSON objects, ConfigError for objects without `text_field`.
    """
    offset = chunk.offset
    for number, item in enumerate(chunk.items, chunk.number):
        if chunk.kind == "text":
            yield _utf8(item or b"", str(chunk.path), offset)
        elif chunk.kind == "row":
            place = f"{chunk.path}: row {number}"
            if item is None:
                raise CorruptError(f"{place}: column {text_field!r} is null")
            yield _utf8(item, place, 0)
        else:
            line = _utf8(item or b"", f"{chunk.path}: line {number}", offset)
            if number == 1:
                line = line.removeprefix("\ufeff")  # the byte order mark that Windows writes
            if line.strip():
                yield _json_text(line, f"{chunk.path}: line {number}", text_field)
        offset += len(item or b"")


def _utf8(raw: bytes, place: str, offset: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise CorruptError(
            f"{place}: not UTF-8 at byte offset {offset + error.start} ({error.reason}); "
            "convert the file to UTF-8"
        ) from None


def _json_text(line: str, place: str, text_field: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise CorruptError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # an endless number, brackets too deep
        raise CorruptError(f"{place}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CorruptError(f"{place}: a JSON object is needed, not {type(value).__name__}")
    if text_field not in value:
        fields = ", ".join(sorted(value)[:8]) or "none"
        raise ConfigError(
            f"{place}: no field {text_field!r} (fields: {fields}); name it with --text-field"
        )
    text = value[text_field]
    if not isinstance(text, str):
        raise CorruptError(f"{place}: field {text_field!r} is {type(text).__name__}, not a string")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise CorruptError(
                f"{place}: field {text_field!r} has half a surrogate pair, \\u{code:04x}, "
                f"at character {error.start}: not text"
            ) from None
    return text


def _text_chunks(path: Path) -> Iterator[Chunk]:
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size <= WHOLE_TEXT_BYTES:
            whole = file.read()
            yield Chunk(path, "text", [whole], 1, 0, len(whole))
            return
        offset, number = 0, 1
        while block := file.read(CHUNK_BYTES):
            block += file.readline(WHOLE_TEXT_BYTES)  # up to the end of the line
            while not block.endswith(b"\n") and (more := file.read(1)):
                if more[0] & 0xC0 != 0x80:  # an endless line is cut between two characters
                    file.seek(-1, os.SEEK_CUR)
                    break
                block += more
            yield Chunk(path, "text", [block], number, offset, len(block))
            offset, number = offset + len(block), number + 1


def _jsonl_chunks(path: Path) -> Iterator[Chunk]:
    items: list[bytes | None] = []
    offset = end = consumed = 0
    first = number = 1
    with open(path, "rb") as file:
        for line in _lines(file, path):
            items.append(line)
            end, number = end + len(line), number + 1
            if end - offset >= CHUNK_BYTES:
                position = file.tell()
                yield Chunk(path, "jsonl", items, first, offset, position - consumed)
                items, first, offset, consumed = [], number, end, position
        yield Chunk(path, "jsonl", items, first, offset, file.tell() - consumed)


def _lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Yields the lines of a .jsonl, .jsonl.gz or .jsonl.zst, with their line ends."""
    if path.suffix == ".jsonl":
        blocks = iter(lambda: file.read(READ_BYTES), b"")
    elif path.suffix == ".gz":
        blocks = _gzip_blocks(file, path)
    else:
        blocks = _zstd_blocks(file, path)
    number, rest = 1, []  # `rest`: the pieces of a line that is not whole yet
    rest_bytes = 0
    for block in blocks:
        head, *more = block.split(b"\n")
        rest.append(head)
        rest_bytes += len(head)
        if rest_bytes > MAX_LINE_BYTES:
            raise CorruptError(f"{path}: line {number} is longer than {MAX_LINE_BYTES >> 20} MiB")
        for piece in more:
            yield b"".join(rest) + b"\n"
            number, rest, rest_bytes = number + 1, [piece], len(piece)
    if rest_bytes:
        yield b"".join(rest)


def _gzip_blocks(file: BinaryIO, path: Path) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file) as stream:
            while block := stream.read(READ_BYTES):
                yield block
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CorruptError(f"{path}: damaged gzip data: {error}") from None


def _zstd_blocks(file: BinaryIO, path: Path) -> Iterator[bytes]:
    import zstandard

    # zstandard's own stream reader takes a truncated file for a whole one; this object knows.
    frame, inside = zstandard.ZstdDecompressor().decompressobj(), False
    try:
        while raw := file.read(READ_BYTES):
            while raw:
                inside = True
                yield frame.decompress(raw)
                raw = b""
                if frame.eof:
                    raw = frame.unused_data
                    frame, inside = zstandard.ZstdDecompressor().decompressobj(), False
    except zstandard.ZstdError as error:
        raise CorruptError(f"{path}: damaged zstd data: {error}") from None
    if inside:
        raise CorruptError(f"{path}: damaged zstd data: the file ends inside a frame")


def _parquet_chunks(path: Path, text_field: str) -> Iterator[Chunk]:
    try:
        pa = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ConfigError(
            f"{path}: reading parquet needs pyarrow: pip install 'megallama[parquet]'"
        ) from None
    try:
        with parquet.ParquetFile(path) as table:
            schema = table.schema_arrow
            if text_field not in schema.names:
                names = ", ".join(schema.names[:8])
                raise ConfigError(
                    f"{path}: no column {text_field!r} (columns: {names}); "
                    "name it with --text-field"
                )
            kind = schema.field(text_field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise CorruptError(f"{path}: column {text_field!r} is {kind}, not a string")
            row = 1
            share = os.path.getsize(path) / max(1, table.metadata.num_rows)
            for batch in table.iter_batches(batch_size=256, columns=[text_field]):
                items = batch.column(0).cast(pa.large_binary()).to_pylist()
                consumed = int((row + len(items) - 1) * share) - int((row - 1) * share)
                yield Chunk(path, "row", items, row, 0, consumed)
                row += len(items)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's, not pyarrow's word for damaged pages
        raise CorruptError(f"{path}: damaged parquet file: {error}".splitlines()[0]) from None
