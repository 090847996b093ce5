"""The program format: round trip, validation, listing, generated header."""

from __future__ import annotations

from random import Random

import pytest
import torch
from ffn_cases import RELEASED, random_case

from kernels import generate_header
from kernels.language.disassembly import disassemble
from kernels.language.expression import ExpressionError, parse_expression
from kernels.language.lowering import load_program, lower
from kernels.language.operators import OPERATORS
from kernels.language.program import (
    FIRST_INSTRUCTION,
    HEADER_WORDS,
    MAX_TEMPORARIES,
    Flag,
    Segment,
    WidthRule,
    decode_segments,
    destinations,
    encode,
    sources,
)
from kernels.language.validation import checked_words, validate_program


def words_of(text: str, policy: str = "truncate") -> list[int]:
    return list(lower(text, policy).words)


def test_programs_decode_to_what_was_encoded():
    for text in RELEASED:
        program = lower(text)
        again = encode(decode_segments(program.words), program.words[3], "truncate", program.rule, program.flags)
        assert again == program.words
        assert load_program(program.tensor.clone()) == program


def test_random_programs_are_valid_and_keep_to_the_register_file():
    rng = Random(0)
    for _ in range(300):
        case = random_case(rng, (3, 5), (1,))
        program = lower(case.expression, case.policy)
        assert validate_program(program.tensor) == program.words
        for segment in decode_segments(program.words):
            assert segment.temporaries <= MAX_TEMPORARIES
            assert all(4 <= r < 20 for i in segment.instructions for r in destinations(i))
            assert all(0 <= r < 20 for i in segment.instructions for r in sources(i))


FROZEN = {
    "linear(gelu(linear(max(x,tanh(x)),wb1)),wb2)": "2432df4244a3e1e45a969043e5a7cde5",
    "linear(relu(mul(linear(x,wb1),x)),wb2)": "d8e9739ae1df567b1528a8a863ea21c4",
    "elu(linear(gelu_erf(linear(x,wb1)),wb2))": "3943c1a64705864009a79df701c0d394",
    "leaky_relu(linear(sigmoid(linear(swish(x),wb1)),wb2))": "b8993c7672dabd3f2305f1554fb507c9",
    "add(mul(gelu(linear(x,wb1)),x),tanh(linear(sigmoid(x),wb2)))": "b1df85748d52dabc1b52c297cbb914fc",
}
"""Digests of programs as they were before operators were appended (relu2, softplus, identity)."""


@pytest.mark.parametrize("text", FROZEN)
def test_appended_operators_leave_older_programs_as_they_were(text):
    assert lower(text).digest.hex() == FROZEN[text]


def test_opcodes_are_never_renumbered():
    numbers = {row.name: row.opcode for row in OPERATORS.values()}
    assert numbers == {
        "add": 1, "mul": 2, "max": 3, "gelu": 16, "sigmoid": 17, "tanh": 18, "relu": 19, "leaky_relu": 20, "elu": 21,
        "swish": 22, "gelu_erf": 23, "relu2": 24, "softplus": 25, "identity": 26,
    }  # fmt: skip


def test_an_opcode_nobody_knows_is_refused():
    words = words_of("linear(identity(linear(x,wb1)),wb2)")
    swish = words_of("linear(swish(linear(x,wb1)),wb2)")
    assert len(words) < len(swish)  # identity is gone from lowered programs
    at = next(n for n in range(FIRST_INSTRUCTION, len(swish)) if swish[n] == OPERATORS["swish"].opcode)
    swish[at] = max(row.opcode for row in OPERATORS.values()) + 1
    with pytest.raises(ExpressionError, match="unknown opcode 27"):
        load_program(torch.tensor(swish, dtype=torch.int32))


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, 1, "magic"),
        (1, 99, "version"),
        (2, 7, "length"),
        (3, 2, "form"),
        (4, 5, "policy"),
        (5, 4, "width rule"),
        (6, 1 << 20, "flags"),
        (6, 0, "flags"),
        (7, 15, "disagrees"),
        (9, 1, "disagrees"),
        (HEADER_WORDS + 8 * Segment.MID, 4, "outside"),
        (HEADER_WORDS + 8 * Segment.MID, FIRST_INSTRUCTION + 2, "outside"),
        (HEADER_WORDS + 8 * Segment.MID + 1, 5000, "limit"),
        (HEADER_WORDS + 8 * Segment.MID + 1, 500, "outside"),
        (HEADER_WORDS + 8 * Segment.MID + 1, -1, "limit"),
        (HEADER_WORDS + 8 * Segment.MID + 4, 9, "holds nothing"),
        (HEADER_WORDS + 8 * Segment.MID + 4, -1, "holds nothing"),
        (HEADER_WORDS + 8 * Segment.MID + 5, 0, "no output dx"),
        (FIRST_INSTRUCTION, 15, "unknown opcode"),
        (FIRST_INSTRUCTION, -16, "opcode"),
        (FIRST_INSTRUCTION + 1, 2, "cannot be written"),
        (FIRST_INSTRUCTION + 1, 20, "cannot be written"),
        (FIRST_INSTRUCTION + 2, 7, "before it is written"),
        (FIRST_INSTRUCTION + 2, -5, "before it is written"),
        (FIRST_INSTRUCTION + 2, 3, "before it is written"),
    ],
)
def test_damaged_programs_are_refused(at, value, message):
    words = words_of("tanh(linear(relu(mul(linear(x,wb1),x)),wb2))")
    words[at] = value
    with pytest.raises(ExpressionError, match=message):
        validate_program(torch.tensor(words, dtype=torch.int32))


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(88), torch.zeros(2, 88, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)],
    ids=["float", "2d", "short"],
)
def test_wrong_tensors_are_refused(tensor):
    with pytest.raises(ExpressionError, match="program"):
        validate_program(tensor)


def test_every_single_word_change_is_refused_or_still_a_valid_program():
    """A fuzzed program either is refused with an `ExpressionError` or decodes to in-range registers."""
    rng = Random(1)
    original = words_of("linear(max(gelu(linear(x,wb1)),x),wb2)")
    for _ in range(600):
        words = list(original)
        words[rng.randrange(len(words))] = rng.choice((-1, 0, 1, 2, 3, 4, 17, 49, 81, 145, 177, 2**31 - 1, -(2**31)))
        try:
            valid = validate_program(torch.tensor(words, dtype=torch.int32))
        except ExpressionError:
            continue
        for segment in decode_segments(valid):
            assert all(0 <= r < 20 for i in segment.instructions for r in (*sources(i), *destinations(i)))


def test_a_changed_tensor_is_validated_again():
    tensor = lower(RELEASED[0]).tensor.clone()
    checked_words(tensor)
    tensor[0] = 5
    with pytest.raises(ExpressionError, match="magic"):
        checked_words(tensor)


def test_flags_and_width_rules():
    plain = lower("linear(gelu(linear(x,wb1)),wb2)")
    assert plain.flags & Flag.PRE_IDENTITY
    assert plain.flags & Flag.POST_IDENTITY
    assert plain.flags & Flag.MID_SINGLE
    assert not plain.flags & (Flag.MID_USES_X | Flag.POST_USES_X | Flag.POST_BWD_USES_Y)
    assert plain.rule is WidthRule.ANY
    mixed = "linear(relu(mul(linear(x,wb1),x)),wb2)"
    assert lower(mixed).rule is WidthRule.AT_MOST_HIDDEN
    assert lower(mixed, "pad").rule is WidthRule.AT_LEAST_HIDDEN
    assert lower(mixed, "pad").flags & Flag.MID_SELECT
    parallel = lower("max(linear(x,wb1),linear(x,wb2))")
    assert parallel.flags & Flag.PARALLEL
    assert parallel.rule is WidthRule.EQUAL_HIDDEN
    with pytest.raises(ExpressionError, match=r"d == H.*H=6 and d=5"):
        parallel.check_widths(6, 5)


def test_listing_names_inputs_and_operators():
    listing = disassemble(lower("tanh(linear(relu(mul(linear(x,wb1),x)),wb2))").tensor)
    assert "r4 = mul(x, h)" in listing
    assert "tanh'(y) * g" in listing


def test_the_header_lists_every_operator_with_its_opcode(tmp_path):
    assert generate_header.write(tmp_path) == f"-I{tmp_path}"
    text = (tmp_path / "opcodes.h").read_text()
    for row in OPERATORS.values():
        name = "".join(word.capitalize() for word in row.name.split("_"))
        assert f"  kOp{name} = {row.opcode}," in text
        assert f"  F({name}, {row.opcode})" in text


def test_canonically_equal_expressions_share_one_program():
    a = lower(parse_expression("linear(mul(x,linear(x,wb1)),wb2)"))
    assert lower("linear( mul(linear(x,wb1), x), wb2)") is a
