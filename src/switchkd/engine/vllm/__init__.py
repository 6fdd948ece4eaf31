"""Rollouts on vLLM: the student is its draft model, the teacher its target model, and the sampler is ours."""
