"""Scores out: sampled answers by ROUGE-L over several decoding seeds, and losses on reference text."""

from switchkd.evaluation.answers import EvaluationResult, evaluate, reference_losses, write_rows

__all__ = ["EvaluationResult", "evaluate", "reference_losses", "write_rows"]
