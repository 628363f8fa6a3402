"""What the planner predicts of a run that was made, beside what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megallama.cli.plan_figures import Planned, planned
from megallama.cli.plan_timeline import beside_measured
from megallama.config.load import load_config
from megallama.errors import ConfigError
from megallama.plan.hardware import load_hardware
from megallama.spec.grid import make_grid
from megallama.train.record import RunRecord, summarise
from megallama.train.trace import Timeline


@dataclass(frozen=True)
class RunPrediction:
    """The plan of a run's own config and ranks."""

    plan: Planned

    def beside(self, run: RunRecord) -> Timeline | None:
        """The run's recorded step over the predicted one; None without one, or with several."""
        if run.timeline is None or run.timeline.several:
            return None
        return beside_measured(self.plan, run.timeline)

    def words(self, run: RunRecord) -> str:
        """One line: predicted and measured."""
        step, measured = self.plan.prediction, summarise(run)
        seconds, rate = measured["median_step_seconds"], step.tokens_per_second_per_gpu
        words = f"{step.step_seconds:.3g} s predicted for {self.plan.hardware.name}"
        if seconds:
            words += f", {seconds:.3g} s measured ({step.step_seconds / seconds - 1:+.1%})"
        words += f"; {rate:,.0f} tokens/s/GPU predicted"
        if exposed := {name: each for name, each in step.exposed.items() if each > 0}:
            longest = max(exposed, key=exposed.__getitem__)
            words += f"; most exposed: {longest}, {exposed[longest]:.2g} s"
        if run.timeline and run.timeline.several:
            words += "; not drawn: several steps were recorded, and one is predicted"
        return words

    def figures(self) -> dict[str, Any]:
        """For --json."""
        step = self.plan.prediction
        return {
            "predicted": {
                "gpu": self.plan.hardware.name,
                "step_seconds": step.step_seconds,
                "tokens_per_second_per_gpu": step.tokens_per_second_per_gpu,
                "mfu": step.mfu,
                "mfu_6n": step.mfu_6n,
                "exposed": dict(step.exposed),
                "memory_bytes": self.plan.memory.largest.held,
            }
        }


def predict_run(run: RunRecord, run_dir: Path, gpu: str) -> RunPrediction:
    """Raises ConfigError where the machine is not known, the run does not say its ranks, or
    they do not make its config's grid."""
    hardware = load_hardware(gpu)
    figures = summarise(run)
    whole, each = (figures[f"median_tokens_per_second{per}"] for per in ("", "_per_gpu"))
    if not whole or not each:
        raise ConfigError(f"{run_dir}: its metrics do not say on how many ranks it ran")
    config, ranks = load_config(run_dir / "config.yaml"), round(whole / each)
    try:
        make_grid(config, ranks)
    except ConfigError as error:
        raise ConfigError(
            f"{run_dir}: its metrics are of {ranks} ranks, its config.yaml of another grid; give "
            f"the run's own config back, or report without --gpu ({error})"
        ) from None
    return RunPrediction(planned(config, hardware, ranks, None))
