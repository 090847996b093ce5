"""Validation of serialized programs: what a backend may rely on without checking again.

Chosen: decode, check every read and write, encode again and compare, so that derived words cannot disagree with the
code. Rejected: a checksum word; it proves that a program was written by somebody, not that it is safe to run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.language.expression import ExpressionError
from kernels.language.program import (
    FIRST_INSTRUCTION,
    HEADER_WORDS,
    IMMEDIATES,
    INSTRUCTION_WORDS,
    MAGIC,
    MAX_INSTRUCTIONS,
    NONE,
    NUM_INPUTS,
    NUM_REGISTERS,
    POLICIES,
    SELECT,
    VERSION,
    A,
    B,
    Flag,
    Form,
    G,
    Segment,
    WidthRule,
    X,
    decode_segments,
    derive_flags,
    destinations,
    encode,
    segment_entry,
    sources,
    unpack,
)


def validate_program(program: torch.Tensor) -> tuple[int, ...]:
    """Checks a serialized program before anything runs it, and returns its words.

    Everything a backend relies on is checked: dtype, layout, magic, version, lengths and offsets, opcodes, register
    numbers, that a temporary is written before it is read, and that derived header and table words agree with the code.

    Raises:
        ExpressionError: the tensor is not a valid program; the message names the word or instruction.
    """
    if not isinstance(program, torch.Tensor) or program.dtype != torch.int32 or program.dim() != 1:
        raise ExpressionError(f"program must be a one-dimensional int32 tensor, got {_describe(program)}")
    if program.numel() < FIRST_INSTRUCTION:
        raise ExpressionError(f"program of {program.numel()} words is shorter than its header ({FIRST_INSTRUCTION})")
    words = tuple(program.tolist())
    _check_header(words)
    for k in Segment:
        _check_segment(words, k)
    segments = decode_segments(words)
    form, policy, rule, flags = Form(words[3]), POLICIES[words[4]], WidthRule(words[5]), Flag(words[6])
    if encode(segments, form, policy, rule, flags) != words:
        raise ExpressionError("program's header or segment table disagrees with its instructions")
    if derive_flags(segments, form) != flags:
        raise ExpressionError(f"program's flags {int(flags)} disagree with its instructions")
    return words


def _describe(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{value.dtype} of shape {tuple(value.shape)}"


def _check_header(words: Sequence[int]) -> None:
    expected: dict[int, tuple[str, tuple[int, ...]]]
    expected = {0: ("magic", (MAGIC,)), 1: ("format version", (VERSION,)), 2: ("length", (len(words),))}
    expected |= {3: ("form", (0, 1)), 4: ("policy", (0, 1)), 5: ("width rule", (0, 1, 2, 3))}
    for at, (name, allowed) in expected.items():
        if words[at] not in allowed:
            raise ExpressionError(
                f"program {name} (word {at}) is {words[at]}, expected {' or '.join(map(str, allowed))}"
            )
    if not 0 <= words[6] <= sum(Flag):
        raise ExpressionError(f"program flags (word 6) {words[6]} has unknown bits")


def _check_segment(words: Sequence[int], k: Segment) -> None:
    name = k.name.lower()
    offset, count, _, _, *outputs = segment_entry(words, k)
    if not 0 <= count <= MAX_INSTRUCTIONS:
        raise ExpressionError(f"program segment {name} has {count} instructions, the limit is {MAX_INSTRUCTIONS}")
    if offset % 4 or offset < FIRST_INSTRUCTION or offset + INSTRUCTION_WORDS * count > len(words):
        raise ExpressionError(f"program segment {name} at word {offset} with {count} instructions lies outside")
    available = set(_available_inputs(words[3], k))
    for n in range(count):
        where = f"program segment {name}, instruction {n}"
        i = unpack(words, offset + INSTRUCTION_WORDS * n)
        if i.opcode == SELECT and not 0 <= i.b < len(IMMEDIATES):
            raise ExpressionError(f"{where}: immediate {i.b} is unknown")
        for r in sources(i):
            if r not in available:
                raise ExpressionError(f"{where}: register {r} is read before it is written")
        for r in destinations(i):
            if not NUM_INPUTS <= r < NUM_REGISTERS:
                raise ExpressionError(f"{where}: register {r} cannot be written")
            available.add(r)
        if len(set(destinations(i))) != len(destinations(i)):
            raise ExpressionError(f"{where}: both results go to register {i.dst}")
    wanted = _expected_outputs(words[3], k)
    for label, register, must in zip(("value", "dx", "da", "db"), outputs, wanted, strict=True):
        if register not in available and not (register == NONE and must is not True):
            raise ExpressionError(f"program segment {name}: output {label} is register {register}, which holds nothing")
        if must is False and register != NONE:
            raise ExpressionError(f"program segment {name} has no output {label}")


def _available_inputs(form: int, k: Segment) -> tuple[int, ...]:
    own = {0: (X,), 1: (X,) if form == Form.PARALLEL else (X, A), 2: (X, A, B) if form == Form.PARALLEL else (X, A)}
    return own[k % 3] + ((G,) if k >= Segment.PRE_BWD else ())


def _expected_outputs(form: int, k: Segment) -> tuple[bool | None, ...]:
    """Per output whether it must (True), must not (False) or may (None) be there."""
    value = k < Segment.PRE_BWD or k >= Segment.PRE_BWDV
    if k < Segment.PRE_BWD:
        return value, False, False, False
    place = k % 3
    if place == 0 or (place == 1 and form == Form.PARALLEL):
        return value, True, False, False
    return value, None, True, place == 2 and form == Form.PARALLEL


def checked_header(program: torch.Tensor) -> tuple[int, ...]:
    """The header words of a program tensor, validated at its first use and after every in-place change."""
    known = getattr(program, "_ffnas_header", None)
    if known is not None and known[0] == program._version:
        return known[1]
    words = validate_program(program)
    mark_valid(program, words)
    return words[:HEADER_WORDS]


def checked_words(program: torch.Tensor) -> tuple[int, ...]:
    """All words of a program tensor, validated as `checked_header` does."""
    checked_header(program)
    return tuple(program.tolist())


def mark_valid(program: torch.Tensor, words: tuple[int, ...]) -> None:
    """Records that `program` holds the valid `words`; the mark lives and dies with the tensor."""
    program._ffnas_header = (program._version, words[:HEADER_WORDS])  # type: ignore[attr-defined]
