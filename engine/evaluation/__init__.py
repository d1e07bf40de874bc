"""How good the candidates and embeddings are, measured on what users did afterwards; and the report of a whole run."""

from alure.engine.evaluation.recall import EvaluationReport, evaluate

__all__ = ["EvaluationReport", "evaluate"]
