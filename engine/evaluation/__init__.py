"""How good the candidates and embeddings are, measured on what users did afterwards; and the report of a whole run."""

from alure.engine.evaluation.recall import EvaluationReport, evaluate
from alure.engine.evaluation.report import write_figure, write_report
from alure.engine.evaluation.report_data import ReportData, gather_report_data, summary

__all__ = [
    "EvaluationReport",
    "ReportData",
    "evaluate",
    "gather_report_data",
    "summary",
    "write_figure",
    "write_report",
]
