"""The self-contained demo: a generated task, a teacher and a student trained from random weights, SWITCH beside SFT."""
