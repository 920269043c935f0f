"""Tables, plots and pages that show what a run did, made from its folder alone."""

from mycel.report.compare import compare, compare_rows, write_comparison
from mycel.report.islands import ways_table
from mycel.report.page import write_report
from mycel.report.serving import write_serving_report
from mycel.report.tables import bytes_line, summary_table

__all__ = [
    "bytes_line",
    "compare",
    "compare_rows",
    "summary_table",
    "ways_table",
    "write_comparison",
    "write_report",
    "write_serving_report",
]
