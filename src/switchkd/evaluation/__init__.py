"""Scores out: sampled answers by ROUGE-L over several decoding seeds, and losses on reference text."""

from switchkd.evaluation.answers import EvaluationResult, evaluate, write_rows
from switchkd.evaluation.losses import reference_losses, sequence_divergences

__all__ = ["EvaluationResult", "evaluate", "reference_losses", "sequence_divergences", "write_rows"]
