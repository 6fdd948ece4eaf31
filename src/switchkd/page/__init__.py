"""HTML for people: figures as inline SVG, rollouts with their writers marked, one file that needs nothing else."""
