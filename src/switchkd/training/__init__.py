"""The trainer, what its configuration means, and where the text of a step comes from."""
