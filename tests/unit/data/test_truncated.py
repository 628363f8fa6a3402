"""A token file that is cut underneath a reader ends in an error, not in a signal.

In a process of its own, which SIGBUS would end.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.data.conftest import MakeFile

READ = """
import sys
from pathlib import Path
from megallama.data.token_files import TokenFile
from megallama.data.verify import verify
from megallama.errors import CorruptError
prefix, suffix, how = sys.argv[1:]
file = TokenFile(prefix)
verify(file)
with open(prefix + suffix, "r+b") as cut:
    cut.truncate(50)
try:
    {"starts": lambda: file.document_starts(90_000, 5_000), "verify": lambda: verify(file),
     "document": lambda: file.document(9000)}[how]()
except CorruptError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "suffix, how",
    [(".idx", "starts"), (".idx", "verify"), (".idx", "document"), (".bin", "document")],
)
def test_a_file_that_is_cut_while_it_is_read(make_file: MakeFile, suffix: str, how: str) -> None:
    prefix = make_file([[1] * 10] * 10_000)
    command = [sys.executable, "-c", READ, str(prefix), suffix, how]
    root = Path(__file__).parents[3]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert str(prefix) + suffix in done.stdout
