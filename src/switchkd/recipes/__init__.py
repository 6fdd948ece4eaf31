"""Whole experiments, stage by stage, from one file: those of the papers, of modern pairs, and a miniature."""
