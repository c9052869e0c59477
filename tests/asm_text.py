"""Inline assembly in C++ text: the PTX instructions of every asm statement, and what their
operands are bound to."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Leaf:
    """An operand: its constraint letter ("p": a predicate register, "n": a number) and what it is
    bound to (an expression, a register's name or the number)."""

    kind: str
    bound: str
    written: bool = False
    read: bool = True


@dataclass(frozen=True)
class Instruction:
    """One PTX instruction. form: mnemonic and operands, each operand of the asm statement as its
    constraint letter; leaves: those operands in the order of the text."""

    form: str
    leaves: tuple[Leaf, ...]
    statement: int  # number of the asm statement in its text
    function: str  # that it stands in
    volatile: bool

    @property
    def mnemonic(self) -> str:
        return self.form.split(" ")[0]


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|//[^\n]*|/\*.*?\*/', re.DOTALL)
_ASM = re.compile(r"\basm\s*(?P<volatile>volatile)?\s*\(")
_FUNCTION = re.compile(r"\b(?!(?:if|for|while|switch)\b)(\w+)\s*\([^;{}]*\)\s*(?:const\s*)?\{")
_OPERAND = re.compile(r'^\s*"(?P<mode>[=+&]*)(?P<kind>\w)"\s*\((?P<bound>.*)\)\s*$', re.DOTALL)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one before `start`."""
    depth, at = 1, start
    while depth:
        token = _TOKEN.match(text, at)
        if token:
            at = token.end()
            continue
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        at += 1
    return at - 1


def _split(text: str, separator: str) -> list[str]:
    """Parts between separators that stand outside of strings and brackets."""
    parts, depth, at, last = [], 0, 0, 0
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token:
            at = token.end()
            continue
        depth += (text[at] in "([{") - (text[at] in ")]}")
        if text[at] == separator and depth == 0:
            parts.append(text[last:at])
            last = at + 1
        at += 1
    return [*parts, text[last:]]


def _branches(text: str) -> set[str]:
    """The text with the first, and with the second branch of its #if lines."""
    if not re.search(r"^\s*#", text, re.MULTILINE):
        return {text}
    found = set()
    for wanted in (True, False):
        lines, keep = [], True
        for line in text.splitlines():
            if re.match(r"\s*#\s*if", line):
                keep = wanted
            elif re.match(r"\s*#\s*(else|elif)", line):
                keep = not wanted
            elif re.match(r"\s*#\s*endif", line):
                keep = True
            elif keep:
                lines.append(line)
        found.add("\n".join(lines))
    return found


def _leaf(operands: list[tuple[str, str, str]], text: str) -> Leaf:
    if re.fullmatch(r"%\d+", text):
        mode, kind, bound = operands[int(text[1:])]
        return Leaf(kind, bound, written="=" in mode or "+" in mode, read="=" not in mode)
    return Leaf("n" if re.fullmatch(r"-?[\d.x]+[0-9a-fA-F]*", text) else "p", text)


def _instruction(
    text: str, operands: list[tuple[str, str, str]], place: tuple[int, str, bool]
) -> Instruction:
    mnemonic, _, rest = text.strip().partition(" ")
    leaves: list[Leaf] = []

    def replace(match: re.Match[str]) -> str:
        leaves.append(_leaf(operands, match[0]))
        return leaves[-1].kind

    form = re.sub(r"%\d+|!?\b[A-Za-z]\w*|-?\b\d\w*", replace, rest.replace(" ", ""))
    return Instruction(f"{mnemonic} {form}".strip(), tuple(leaves), *place)


def _statement(body: str, place: tuple[int, str, bool]) -> Iterator[Instruction]:
    sections = _split(body, ":")
    literals = [token for token in _TOKEN.findall(sections[0]) if token.startswith('"')]
    template = "".join(ast.literal_eval(literal) for literal in literals)
    operands = []
    for section in sections[1:3]:
        for operand in filter(str.strip, _split(section, ",")):
            match = _OPERAND.match(operand)
            if match is None:
                return  # built by a macro: nothing that is compared
            operands.append((match["mode"], match["kind"], match["bound"].strip()))
    template = re.sub(r"//[^\n]*|/\*.*?\*/", "", template, flags=re.DOTALL).strip()
    if template.startswith("{") and template.endswith("}"):
        template = template[1:-1]
    for part in _split(template, ";"):
        text = re.sub(r"\s+", " ", part).strip()
        text = re.sub(r"^(\w+:\s*)*(@!?\w+\s+)?", "", text)  # labels and guards
        if text and not text.startswith(".") and not text.startswith("bra"):
            used = [int(n) for n in re.findall(r"%(\d+)", text)]
            if all(n < len(operands) for n in used):
                yield _instruction(text, operands, place)


def instructions(text: str) -> list[Instruction]:
    """Instructions of every asm statement of a C++ text, in order."""
    text = _TOKEN.sub(lambda token: token[0] if token[0].startswith('"') else " ", text)
    found: list[Instruction] = []
    function, start = "", 0
    for number, match in enumerate(_ASM.finditer(text)):
        for heading in _FUNCTION.finditer(text, start, match.start()):
            function = heading[1]
        start = match.start()
        body = text[match.end() : _closing(text, match.end())]
        for branch in sorted(_branches(body)):
            found += _statement(branch, (number, function, match["volatile"] is not None))
    return found
