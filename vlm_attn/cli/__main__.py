# SPDX-License-Identifier: Apache-2.0
"""``python -m vlm_attn.cli``."""

from vlm_attn.cli import main

if __name__ == "__main__":
    main()
