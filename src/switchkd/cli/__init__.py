"""The frame of the command line: nothing here imports torch or transformers."""
