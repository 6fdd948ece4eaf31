"""Prompts and answers in: records of several shapes become token ids, token ids become micro-batches."""

from switchkd.data.prompts import PrepareReport, alpaca_prompt, encode_prompt, pad_prompts, prepare
from switchkd.data.records import load_records

__all__ = ["PrepareReport", "alpaca_prompt", "encode_prompt", "load_records", "pad_prompts", "prepare"]
