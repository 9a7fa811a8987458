"""Benchmarks of speed, each behind ``vlm-attn bench``. Ratios measured side by side in one run, never absolute times."""
