"""What a user looks at after a run: tables and plots. matplotlib is loaded by `plots` and `style` only."""

from mpitrain.report.command import remarks, table, write_report
from mpitrain.report.runs import Run, load_run, load_runs, summarise, temporal_efficiency

__all__ = ["Run", "load_run", "load_runs", "remarks", "summarise", "table", "temporal_efficiency", "write_report"]
