"""The page a finished run leaves behind: artefacts of the run directory in, one self-contained HTML file out."""

from sseds_rec.report.html import write_report

__all__ = ["write_report"]
