"""What a user looks at after a run: tables and plots. matplotlib is loaded by `plots` and `style` only."""

from mpitrain.report.command import add_arguments, run, write_report
from mpitrain.report.runs import Run, load_run, load_runs, summarise, temporal_efficiency

__all__ = ["Run", "add_arguments", "load_run", "load_runs", "run", "summarise", "temporal_efficiency", "write_report"]
