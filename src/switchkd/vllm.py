"""Rollouts on vLLM: `switchkd.vllm.Engine`."""

from switchkd.engine.vllm.engine import Engine

__all__ = ["Engine"]
