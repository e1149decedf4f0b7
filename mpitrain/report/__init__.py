"""Reports of runs: tables and plots. Only `plots` and `style` import matplotlib."""

from mpitrain.report.command import add_arguments, run
from mpitrain.report.markdown import write_report
from mpitrain.report.runs import Run, load_run, load_runs
from mpitrain.report.summary import summarise, temporal_efficiency

__all__ = ["Run", "add_arguments", "load_run", "load_runs", "run", "summarise", "temporal_efficiency", "write_report"]
