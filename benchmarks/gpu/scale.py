"""Sizes of everything that is measured: on a device, and in a rehearsal on a CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.ffn_cases import HIDDEN, INNER, RELEASED, Case

GELU = "linear(gelu(linear(x,wb1)),wb2)"
"""BERT's own FFN."""
PARALLEL = "add(gelu(linear(x,wb1)),linear(tanh(x),wb2))"


@dataclass(frozen=True)
class Scale:
    """Sizes.

    Attributes:
        device: "cuda", or "cpu" for a rehearsal.
        dtype, autocast: of most cases, and of the products under autocast.
        tokens, few, many: rows of x.
        bert: hidden size and inner width of BERT-base.
        rounds: turns the sides of a case take.
        full: every expression, the autotuned torch.compile.
    """

    device: str
    dtype: str
    autocast: str
    hidden: int
    widths: tuple[int, ...]
    tokens: int
    few: int
    many: int
    bert: tuple[int, int]
    rounds: int
    full: bool = False

    @property
    def rehearses(self) -> bool:
        """Whether nothing is measured."""
        return self.device == "cpu"

    def case(self, expression: str, inner: int, backward: bool) -> Case:
        """A case of the usual number of tokens."""
        return Case(expression, self.dtype, inner, self.tokens, backward, self.hidden, self.device)

    def ffn(self) -> list[Case]:
        """The benchmark's cases, the most telling first."""
        wide = self.widths[0]
        both = (False, True)
        if self.rehearses:
            base = self.case(RELEASED[0], self.widths[1], False)
            return [base, replace(base, backward=True, autocast=self.autocast)]
        found = [self.case(RELEASED[0], d, backward) for d in self.widths for backward in both]
        for backward in both:
            base = self.case(RELEASED[0], wide, backward)
            found += [
                replace(self.case(GELU, self.bert[1], backward), hidden=self.bert[0]),
                replace(base, dtype="fp32", autocast=self.autocast),
                replace(base, tokens=self.many),
            ]
        some = RELEASED[1:] if self.full else (RELEASED[4], RELEASED[3])
        found += [self.case(text, wide, backward) for text in some for backward in both]
        found += [replace(self.case(RELEASED[0], wide, backward), tokens=self.few) for backward in both]
        found += [replace(self.case(RELEASED[0], wide, backward), dtype="fp16") for backward in both]
        return list(dict.fromkeys(found))

    def exact(self) -> list[Case]:
        """The cases compared with float64, gradients included."""
        wide = self.widths[0]
        if self.rehearses:
            return [self.case(PARALLEL, wide, True), replace(self.case(GELU, wide, True), autocast=self.autocast)]
        found = [self.case(RELEASED[0], d, True) for d in self.widths]
        found += [self.case(text, wide, True) for text in (RELEASED[3], RELEASED[4], PARALLEL)]
        found += [
            replace(self.case(GELU, self.bert[1], True), hidden=self.bert[0]),
            replace(found[0], dtype="fp32", autocast=self.autocast),
            replace(found[0], dtype="fp32"),
            replace(found[0], dtype="fp16"),
            replace(found[0], tokens=self.many),
        ]
        return list(dict.fromkeys(found))

    def shapes(self) -> list[Case]:
        """Six shapes, forward and backward: of the times per kernel."""
        wide, _, _, narrow = self.widths
        base = self.case(RELEASED[0], wide, True)
        if self.rehearses:
            return [base]
        found = [base, self.case(RELEASED[0], self.widths[1], True), self.case(RELEASED[0], narrow, True)]
        bert = replace(self.case(GELU, self.bert[1], True), hidden=self.bert[0])
        return [*found, replace(base, tokens=self.few), replace(base, tokens=self.many), bert]


DEVICE = Scale("cuda", "bf16", "bf16", HIDDEN, INNER, 8192, 1024, 32768, (768, 3072), 5)
REHEARSAL = Scale("cpu", "fp32", "fp16", 24, (24, 12, 8, 7), 6, 3, 9, (16, 32), 1)
