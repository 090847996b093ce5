"""Microcode and generated source of the Triton backend, checked without Triton: the translation keeps every value."""

from __future__ import annotations

import subprocess
import sys
from random import Random

import pytest
import torch
from ffn_cases import RELEASED, random_case

from kernels.language.execute import run_segment
from kernels.language.lowering import lower
from kernels.language.operators import OPERATORS
from kernels.language.program import Segment
from kernels.triton.microcode import (
    ADD,
    DERIVATIVE,
    ENTRY_WORDS,
    FIRST_SLOT,
    MAX,
    MAX_FACTOR,
    MUL,
    SELECTED,
    SELECTS,
    SLOT_VARIANTS,
    encode,
    run_steps,
    slot_variants,
    translate,
)

HIDDEN = 5


def operations(columns):
    """The machine's operations as PyTorch functions (acc, v) -> (acc, v)."""
    inside = torch.arange(columns) < HIDDEN

    def factor(a, v):
        half = torch.full_like(a, 0.5)
        return torch.where(a < v, torch.zeros_like(a), torch.where(a == v, half, torch.ones_like(a))), v

    table = {
        ADD: lambda a, v: (a + v, v),
        MUL: lambda a, v: (a * v, v),
        MAX: lambda a, v: (torch.maximum(a, v), v),
        MAX_FACTOR: factor,
        SELECTED: lambda a, v: (torch.where(a == 0, torch.zeros_like(a), a * v), v),
    }
    for k, outside in enumerate((0.0, 1.0, -float("inf"))):
        table[SELECTS + k] = lambda a, v, o=outside: (torch.where(inside, a, torch.full_like(a, o)), v)
    for row in OPERATORS.values():
        if row.arity == 1:
            table[row.opcode] = lambda a, v, row=row: (row.forward(a), v)
            table[row.opcode + DERIVATIVE] = lambda a, v, row=row: (row.gradient(v, a), row.forward(v))
    return table


def test_translation_keeps_every_output():
    """600 random programs, all nine segments; exact, since the same operations are done in another arrangement."""
    rng, inputs = Random(1), [torch.randn(3, HIDDEN, dtype=torch.float64) for _ in range(4)]
    inputs[0][0] = 0.0
    inputs[1][1] = inputs[0][1]  # ties for max
    table, one = operations(HIDDEN), torch.ones(3, HIDDEN, dtype=torch.float64)
    for _ in range(600):
        case = random_case(rng, (HIDDEN,), (3,))
        words = lower(case.expression, case.policy).words
        for k, segment in zip(Segment, translate(words), strict=True):
            wanted = run_segment(words, k, *inputs)
            for own, other in zip(run_steps(segment, [*inputs, one], table), wanted, strict=True):
                assert (own is None) == (other is None)
                assert own is None or torch.allclose(own, other, rtol=1e-12, atol=1e-12, equal_nan=True), (str(case), k)


def test_select_pads_columns_past_the_hidden_width():
    words = lower("linear(max(linear(x,wb1),x),wb2)", "pad").words
    x, h = torch.randn(3, HIDDEN, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    wide = torch.nn.functional.pad(x, (0, 3))
    value, *_ = run_steps(translate(words)[Segment.MID], [wide, h, h, h, torch.ones_like(h)], operations(8))
    assert torch.equal(value, run_segment(words, Segment.MID, x, h)[0])


def test_encoding_reproduces_the_steps():
    for text in RELEASED:
        words = lower(text).words
        code = encode(words)
        for k, segment in enumerate(translate(words)):
            entry = ENTRY_WORDS * k
            first, count, *outputs, start, _ = code[entry : entry + ENTRY_WORDS]
            assert (count, tuple(outputs), start) == (len(segment.steps), segment.outputs, segment.start)
            assert list(code[entry + first : entry + first + count]) == [step.word() for step in segment.steps]
        assert code[-1] == 0


def test_slots_are_within_the_variant_chosen():
    rng = Random(2)
    for _ in range(200):
        case = random_case(rng, (HIDDEN,), (3,))
        words = lower(case.expression, case.policy).words
        for segment, variant in zip(translate(words), slot_variants(words), strict=True):
            assert variant in SLOT_VARIANTS
            used = [step.store for step in segment.steps if step.store is not None]
            used += [r - FIRST_SLOT for r in segment.outputs if r >= FIRST_SLOT]
            assert max(used, default=-1) < segment.slots <= variant


def test_released_expressions_take_few_steps_and_slots():
    for text in RELEASED:
        forward = translate(lower(text).words)[:3]
        assert sum(len(s.steps) for s in forward) <= 4
        assert max(s.slots for s in forward) == 0


def test_generated_source_is_replaced_when_it_was_changed(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from kernels.triton import codegen

    monkeypatch.setenv("FFNAS_CACHE", str(tmp_path))
    words = lower("linear(swish(linear(x,wb1)),wb2)").words
    codegen.load.cache_clear()
    codegen.load(words)
    (file,) = (tmp_path / "triton" / "generated").glob("ffnas_generated_*.py")
    written = file.read_text()
    assert written == codegen.source(words)
    file.write_text("raise SystemExit")
    codegen.load.cache_clear()
    codegen.load(words)
    assert file.read_text() == written
    codegen.load.cache_clear()


def test_importing_the_backend_imports_no_triton():
    code = "import sys, kernels.backends.triton; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
