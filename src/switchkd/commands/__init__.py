"""The commands, one module each: `parser()` lists the options, `run()` does the work and imports what it needs."""
