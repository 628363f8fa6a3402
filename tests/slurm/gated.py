"""`megallama` whose training waits at some steps: `python -m tests.slurm.gated WORDS`.

After the row of each step in $GATES it makes the file $GATE_DIR/reached-STEP, and goes on once it
was asked to stop, or $GATE_DIR/open-STEP is there.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from megallama.cli.main import main


def put_gates() -> None:
    from megallama.train.console import Console
    from megallama.train.metrics import Row
    from megallama.train.signals import StopSignals

    gates = {int(step) for step in os.environ.get("GATES", "").split(",") if step}
    folder = Path(os.environ.get("GATE_DIR", "."))
    asked, request, show = [], StopSignals._request, Console.step

    def note(self: StopSignals, number: int, frame: object) -> None:
        asked.append(number)
        request(self, number, None)

    def wait(self: Console, row: Row) -> None:
        show(self, row)
        if row["step"] in gates and not self._quiet:
            (folder / f"reached-{row['step']}").touch()
            while not asked and not (folder / f"open-{row['step']}").exists():
                time.sleep(0.02)

    StopSignals._request = note  # type: ignore[method-assign]
    Console.step = wait  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        put_gates()
    raise SystemExit(main())
