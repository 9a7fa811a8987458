# SPDX-License-Identifier: Apache-2.0
"""The equations of docstrings as MathML: browsers draw it themselves, so nothing is loaded.

A docstring's ``Equation:`` is plain text for ``help()``: a statement a line, and after three spaces or more a note. Here a
name of one letter, a Greek one, a function or a parameter is mathematics, every other word is text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from html import escape

GREEK = {"alpha": "α", "beta": "β", "gamma": "γ", "tau": "τ", "rho": "ρ", "phi": "φ", "sigma": "σ"}
FUNCTIONS = {"argmax", "cos", "det", "exp", "log", "max", "mean", "min", "prod", "softmax", "sqrt", "std", "sum"}
NAMES = {"JSD", "RMS", "VHD", "dA", "Hq", "Hv"}  # of several letters, and no words
OPERATORS = {"->": "→", "<=": "≤", ">=": "≥", "+-": "±", "-": "−", "*": "·", "~": "∼", "...": "…"}
NOTES = 58  # the column where notes begin
_WORD = r"[A-Za-z]+(?:_[A-Za-z]+)*"
_TOKEN = re.compile(
    rf"(?P<space>\s+)|(?P<number>\d+(?:\.\d+)?)|(?P<name>{_WORD}(?:'s\b)?\d*'?)|(?P<op>\.\.\.|->|<=|>=|\+-|[^\s\w])|(?P<rest>.)"
)
_PUNCTUATION = {",", ";", ":", "."}


def html(equation: str, parameters: Collection[str] = ()) -> str:
    """A section ``Equation`` as a table: a row per statement, its note beside it.

    Args:
        equation: the section's text, without its indent.
        parameters: names of the method's parameters, which are not taken apart at an underscore.
    """
    rows: list[tuple[str, str]] = []
    for text in equation.splitlines():
        if text[NOTES - 2 : NOTES] == "  ":
            statement, note = text[: NOTES - 2], text[NOTES:]
        else:
            statement, _, note = re.sub(r"\s+(=|~|->)\s", r" \1 ", text, count=1).strip().partition("   ")
        statement = re.sub(r"\s+(=|~|->)\s", r" \1 ", statement, count=1).strip()
        if text.startswith(" ") and rows:  # goes on with the line above
            rows[-1] = (f"{rows[-1][0]} {statement}", f"{rows[-1][1]} {note.strip()}".strip())
        elif statement:
            rows.append((statement, note.strip()))
    cells = "".join(
        f"<tr><td>{line(statement, parameters)}</td><td>{line(note, parameters)}</td></tr>"
        if note
        else f'<tr><td colspan="2">{line(statement, parameters)}</td></tr>'
        for statement, note in rows
    )
    return f'<table class="equation"><tbody>{cells}</tbody></table>'


def line(text: str, parameters: Collection[str] = ()) -> str:
    """One line: words as text, what lies between them as ``<math>``."""
    parts: list[str] = []
    inside: list[str] = []

    def close() -> None:
        if inside:
            space = " " if inside[-1] == _SPACE else ""
            content = "".join(inside).removesuffix(_SPACE)
            parts.append(f"<math>{content}</math>{space}" if content else space)
            inside.clear()

    for is_text, markup in _tokens(text, parameters):
        if is_text:
            close()
            parts.append(markup)
        elif markup == _SPACE and not inside:
            parts.append(" ")
        else:
            inside.append(markup)
    close()
    return "".join(parts)


_SPACE = '<mspace width="0.25em"/>'


def _math(text: str, parameters: Collection[str]) -> str:
    """All of a text as mathematics, its words too."""
    return "".join(
        f"<mtext>{markup}</mtext>" if is_text else markup for is_text, markup in _tokens(text, parameters)
    ).strip()


def _tokens(text: str, parameters: Collection[str]) -> Iterator[tuple[bool, str]]:
    """Whether it is text, and its markup, for every token of a line."""
    at, bars, worded = 0, 0, False
    while at < len(text):
        match = _TOKEN.match(text, at)
        assert match is not None
        at = match.end()
        kind, token = str(match.lastgroup), match[0]
        if kind == "space":
            yield False, _SPACE
            continue
        if kind == "name":
            base, at = _name(text, match, parameters)
            worded = base is None
            if base is None:
                yield True, escape(token)
                continue
            if base == "sqrt" and text[at : at + 1] == "(":
                inner, at = _group(text, at)
                yield False, f"<msqrt><mrow>{_math(inner, parameters)}</mrow></msqrt>"
                continue
        elif kind == "number":
            base, worded = f"<mn>{token}</mn>", False
        elif token == "|":
            bars += 1
            form = "prefix" if bars % 2 else "postfix"
            yield False, f'<mo form="{form}" stretchy="false">|</mo>'
            continue
        elif (token in _PUNCTUATION and (worded or token in ":;")) or re.fullmatch(
            r"[a-z]-[A-Za-z]", text[at - 2 : at + 1]
        ):
            yield True, token
            continue
        else:
            shown = OPERATORS.get(token, token)
            stretch = ' stretchy="false"' if token in "()[]{}" else ""
            base, worded = f"<mo{stretch}>{escape(shown)}</mo>", False
            if token not in ")]":
                yield False, base
                continue
        while at < len(text) and text[at] in "_^[" and not (text[at] == "[" and kind != "name"):
            tag = "msup" if text[at] == "^" else "msub"
            if text[at] == "[" or text[at + 1] == "(":
                inner, at = _group(text, at if text[at] == "[" else at + 1)
            else:
                found = re.compile(r"[A-Za-z0-9]+(?:,[A-Za-z0-9]+)?'?").match(text, at + 1)
                assert found is not None, text
                inner, at = found[0], found.end()
            primed = re.fullmatch(r"<msup>(.*)(<mrow>(?:<mo>′</mo>)+</mrow>)</msup>", base)
            if primed and tag == "msub":
                base = f"<msubsup>{primed[1]}<mrow>{_math(inner, parameters)}</mrow>{primed[2]}</msubsup>"
                continue
            base = f"<{tag}>{base}<mrow>{_math(inner, parameters)}</mrow></{tag}>"
        yield False, base


def _name(text: str, match: re.Match[str], parameters: Collection[str]) -> tuple[str | None, int]:
    """A name as mathematics (None: it is a word of a sentence), and where it ends."""
    token, end = match[0], match.end()
    if re.fullmatch(r"\w\w+", token) and text[end : end + 1] == "-" and text[end + 1 : end + 2].isalpha():
        return None, end
    if token in parameters and token not in GREEK:
        return f"<mi>{escape(token)}</mi>", end
    if "_" in token:  # only its part up to there; the rest is a subscript
        token = token.partition("_")[0]
        end = match.start() + len(token)
    stem = token.rstrip("'0123456789")
    prime = "<mo>′</mo>" * token.count("'")
    if token.endswith("'s"):
        return None, match.end()
    if (
        stem == "a"
        and re.match(r" (?!in\b|of\b)[a-z]{3,}", text[end:])
        and not re.match(r" (?:mean|max|min)_", text[end:])
    ):
        return None, match.end()  # the article
    if stem == "sqrt":
        return "sqrt", end
    if stem in GREEK:
        return _primed(f"<mi>{GREEK[stem]}</mi>", prime), end
    if stem in FUNCTIONS and re.match(r"[_(\[ ]", text[end : end + 1]):
        if stem in ("mean", "sum", "max", "min", "std") and not re.match(r"[_(\[]| [A-Za-z]['\[_ ]| \(", text[end:]):
            return None, match.end()
        if stem in ("mean", "sum") and re.match(r" (?:of|over|that|and|in|is)\b", text[end:]):
            return None, match.end()
        return f"<mi>{stem}</mi><mo>&#x2061;</mo>" if text[end : end + 1] in "([" else f"<mi>{stem}</mi>", end
    digits = stem and token[len(stem) :].rstrip("'")
    if len(stem) == 1 or stem in NAMES:
        base = f"<mi>{stem}</mi>"
        return _primed(f"<msub>{base}<mn>{digits}</mn></msub>" if digits else base, prime), end
    if text[end : end + 1] in ("[", "(") or text[match.start() :].startswith(stem + "_"):
        return f"<mi>{token}</mi>", end
    return None, match.end()


def _primed(base: str, prime: str) -> str:
    return f"<msup>{base}<mrow>{prime}</mrow></msup>" if prime else base


def _group(text: str, at: int) -> tuple[str, int]:
    """What stands in the brackets that open there, and where they end."""
    depth = 0
    for place in range(at, len(text)):
        depth += (text[place] in "([") - (text[place] in ")]")
        if not depth:
            return text[at + 1 : place], place + 1
    raise ValueError(f"a bracket is open: {text[at:]}")
