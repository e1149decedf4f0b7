"""Reports of runs: tables and plots. Only `plots` and `style` import matplotlib."""

from mpitrain.report.markdown import remarks, table, write_report
from mpitrain.report.runs import Run, load_run, load_runs
from mpitrain.report.summary import summarise, temporal_efficiency

__all__ = ["Run", "load_run", "load_runs", "remarks", "summarise", "table", "temporal_efficiency", "write_report"]
