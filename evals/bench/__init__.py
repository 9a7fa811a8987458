# SPDX-License-Identifier: Apache-2.0
"""Benchmarks, each behind ``vlm-attn bench``. Speeds are ratios measured side by side in one run, never absolute times."""
