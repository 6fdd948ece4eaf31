"""The models as transformers makes them: loading, vocabularies, forward passes, output heads."""
