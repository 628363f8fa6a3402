"""Runs tests/gpu and writes a summary: `python -m tests.gpu [--json F] [--seconds N] [PYTEST …]`.

The summary has the device, the counts, and each failure with its message. It is written anew every
few seconds, so that whoever is stopped has what was found. No test is begun after the time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

EVERY_SECONDS = 5.0


class Summary:
    """A plugin of pytest's that keeps a file up to date."""

    def __init__(self, path: Path | None, seconds: float) -> None:
        self.path, self.began, self.written = path, time.monotonic(), 0.0
        self.deadline = self.began + seconds
        self.counts: Counter[str] = Counter()
        self.failures: list[dict[str, str]] = []
        self.skipped: Counter[str] = Counter()
        self.collected = 0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.collected = len(session.items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        self.counts[report.outcome] += 1
        if report.failed:
            self.failures.append({"test": report.nodeid, "message": report.longreprtext[-2000:]})
        if report.skipped and isinstance(report.longrepr, tuple):
            self.skipped[str(report.longrepr[2])] += 1
        if time.monotonic() - self.written > EVERY_SECONDS:
            self.write()

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.monotonic() > self.deadline:
            item.session.shouldstop = "no time is left"

    def pytest_sessionfinish(self) -> None:
        self.write()

    def report(self) -> dict[str, Any]:
        here = torch.cuda.is_available()
        return {
            "device": torch.cuda.get_device_name() if here else None,
            "torch": torch.__version__,
            "seconds": round(time.monotonic() - self.began, 1),
            "collected": self.collected,
            **{name: self.counts[name] for name in ("passed", "failed", "skipped")},
            "not_run": self.collected - self.counts.total(),
            "failures": self.failures,
            "reasons_for_skipping": dict(self.skipped),
        }

    def write(self) -> None:
        self.written = time.monotonic()
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.report(), indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=500)
    args, others = parser.parse_known_args()
    summary = Summary(args.json, args.seconds)
    folder = str(Path(__file__).parent)
    code = pytest.main([folder, "-p", "no:cacheprovider", *others], plugins=[summary])
    counts = summary.report()
    print(
        f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped,",
        end="",
    )
    print(f" {counts['not_run']} not run, on {counts['device'] or 'no GPU'}")
    # A run that is cut short, or that tested nothing on a GPU, has not passed.
    return int(code) or int(counts["not_run"] > 0 or counts["device"] is None)


if __name__ == "__main__":
    sys.exit(main())
