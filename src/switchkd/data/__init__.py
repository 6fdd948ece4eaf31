"""Prompts and answers in: records of several shapes become token ids, token ids become micro-batches."""

from switchkd.data.prompts import PrepareReport, alpaca_prompt, encode_prompt, prepare
from switchkd.data.records import load_records

__all__ = ["PrepareReport", "alpaca_prompt", "encode_prompt", "load_records", "prepare"]
