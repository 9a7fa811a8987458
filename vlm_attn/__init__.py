"""Attention edits for Hugging Face vision-language models: one patch(), native generate(), exactly undone."""

__version__ = "0.1.0"
