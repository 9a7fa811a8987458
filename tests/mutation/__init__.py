# SPDX-License-Identifier: Apache-2.0
"""Planted faults: small, plausible mistakes as data, and a command that says whether the tests notice each of them.

    python -m tests.mutation                    # all of them, minutes
    python -m tests.mutation gift "sqrt D"      # those whose area, file or description holds one of these words
    python -m tests.mutation --list

A fault lies in ``faults/AREA.toml``: ``file`` and ``old``, a text that occurs once in it; ``new``, what stands there
instead; ``what`` it does; ``tests`` that should notice. Nothing is written: the fault is put in when the file is imported,
in a process of its own, in which the tests then run until the first fails. A file that was moved is found by ``old``.
"""
