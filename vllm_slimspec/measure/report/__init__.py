"""``slimspec report``: pages and pictures of what the measuring commands wrote."""

from vllm_slimspec.measure.report.heads import plot_heads
from vllm_slimspec.measure.report.page import write_report

__all__ = ["plot_heads", "write_report"]
