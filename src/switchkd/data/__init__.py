"""Prompts and answers in: records of several shapes become token ids, token ids become micro-batches."""

from switchkd.data.containers import Mixture
from switchkd.data.prompts import PrepareReport, encode_prompt, prepare
from switchkd.data.reader import alpaca_prompt
from switchkd.data.records import load_records

__all__ = ["Mixture", "PrepareReport", "alpaca_prompt", "encode_prompt", "load_records", "prepare"]
