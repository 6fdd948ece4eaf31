"""The self-contained demo: a generated task, a teacher and a student made from nothing, SWITCH beside SFT."""
