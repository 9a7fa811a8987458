# SPDX-License-Identifier: Apache-2.0
"""The groups that split the keys of a row. Every part of the project uses these numbers."""

from enum import IntEnum


class Group(IntEnum):
    """Which part of the conversation a column belongs to."""

    SYSTEM = 0  # everything before the question that is not an image: template, system text, earlier turns
    VISUAL = 1  # image tokens
    QUERY = 2  # the user's question
    ROLE = 3  # template tail between the question and the answer
    GENERATED = 4  # everything from the end of the prompt on
    PAD = 5  # padding
