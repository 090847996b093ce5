"""Inference latency of an architecture, predicted from a table measured on this device (`engine.latency.build`).

    latency = fixed + sum over layers [ shape(n, r) + n expression ]
    expression = form + sum over segments in use [ width x (pass(segment) + sum over operators of count x cost) ]

`fixed` is embedding, attention blocks and pooler; `shape` n calls of the FFN's two products at ratio r; the rest is
what the expression adds, by how often each operator occurs before, between and behind the products.

A table holds for one student (sizes, heads, policy) under one set of conditions (batch, length, threads, precision,
device). It states its error on architectures it was not made from; limits are tightened by that error near them
(`LatencyTable.allowed`). Where a tenth of its predictions are off by more than `TRUSTED` it is refused
(docs/decisions/0016).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.architecture.architecture import Architecture, LayerSpec
from engine.architecture.shape import ModelShape, inner_width
from engine.errors import UserError
from engine.files import write_json_atomic
from kernels.bounded import EXPRESSIONS
from kernels.build import source_folder, source_key
from kernels.language.expression import Expression
from kernels.language.lowering import lower
from kernels.language.operators import OPERATORS
from kernels.language.program import Flag, Segment, decode_segments

FORMAT = 1
TRUSTED = 0.15
"""Most that nine tenths of a table's predictions may be off by, as a share of the prediction, for a limit to mean
anything."""
USUAL = 0.9
"""Share of the checked architectures whose errors count: the worst tenth may be a moment of the machine."""
NEAR = 20
"""Least number of checked architectures, nearest to a limit, that say how far off predictions are there."""

SEGMENTS = ("pre", "post")
"""Segments whose being in use costs something of its own; `mid` nearly always is, so the products carry it."""
_NAMES = {row.opcode: name for name, row in OPERATORS.items()}


@dataclass(frozen=True)
class ProgramClass:
    """What of an expression decides its cost: its form, and the operators of each segment with how often they occur.

    Attributes:
        parallel: whether the two products stand side by side.
        operators: (segment, operator, count), sorted; a segment is `pre`, `mid` or `post`.
    """

    parallel: bool
    operators: tuple[tuple[str, str, int], ...]

    @property
    def segments(self) -> tuple[str, ...]:
        """Segments of `SEGMENTS` in use."""
        used = {segment for segment, _, _ in self.operators}
        return tuple(s for s in SEGMENTS if s in used)


@lru_cache(maxsize=EXPRESSIONS)
def program_class(expr: Expression, policy: str = "truncate") -> ProgramClass:
    """The program class of a valid expression under a width policy."""
    program = lower(expr, policy)
    segments = decode_segments(program.words)
    found: Counter[tuple[str, str]] = Counter()
    for segment, name in ((Segment.PRE, "pre"), (Segment.MID, "mid"), (Segment.POST, "post")):
        for instruction in segments[segment].instructions:
            found[name, _NAMES.get(instruction.opcode, "select")] += 1
    parallel = bool(program.flags & Flag.PARALLEL)
    return ProgramClass(parallel, tuple((s, o, c) for (s, o), c in sorted(found.items())))


@dataclass(frozen=True)
class Conditions:
    """What a latency is measured under.

    Attributes:
        batch_size, sequence_length: B and S; all tokens are real.
        threads: CPU threads.
        precision: `"fp32"` or `"bf16"` (autocast).
        device: `"cpu"` or `"cuda"`.
        hardware: name of the processor.
    """

    batch_size: int = 1
    sequence_length: int = 128
    threads: int = 1
    precision: str = "fp32"
    device: str = "cpu"
    hardware: str = ""

    def __str__(self) -> str:
        threads = f", {self.threads} thread{'s' if self.threads > 1 else ''}" if self.device == "cpu" else ""
        where = f"{self.hardware or self.device}{threads}"
        return f"batch {self.batch_size}, {self.sequence_length} tokens, {self.precision}, {where}"


def hardware(device: str) -> str:
    """Name of the processor behind a device."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{named or platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"


@dataclass(frozen=True)
class Check:
    """Prediction against measurement of whole models the table was not made from.

    Attributes:
        pairs: (predicted, measured) milliseconds.
        rank_correlation: Spearman's.
        mean_error, worst_error: relative, absolute values.
    """

    pairs: tuple[tuple[float, float], ...]
    rank_correlation: float
    mean_error: float
    worst_error: float

    @classmethod
    def of(cls, predicted: list[float], measured: list[float]) -> Check:
        from scipy.stats import spearmanr  # deferred: a second of import

        errors = [abs(p - m) / m for p, m in zip(predicted, measured, strict=True)]
        rank = float(spearmanr(predicted, measured).statistic)
        pairs = tuple(zip(predicted, measured, strict=True))
        return cls(pairs, rank if math.isfinite(rank) else 0.0, sum(errors) / len(errors), max(errors))

    def error(self, limit: float | None = None) -> float:
        """What `USUAL` of the measurements are within, in shares of their predictions: of all, or near `limit` ms."""
        return float(np.quantile(np.abs(self._beyond(limit)), USUAL))

    def overrun(self, limit: float | None = None) -> float:
        """Share by which `USUAL` of the measurements at most exceed their predictions; never negative."""
        return max(0.0, float(np.quantile(self._beyond(limit), USUAL)))

    def _beyond(self, limit: float | None) -> np.ndarray:
        """Measured / predicted - 1: of all, or of the half (at least `NEAR`) with predictions nearest to `limit`."""
        predicted, measured = np.asarray(self.pairs, dtype=np.float64).reshape(-1, 2).T
        beyond = measured / predicted - 1
        if limit is None:
            return beyond
        nearest = np.argsort(np.abs(np.log(predicted / limit)), kind="stable")
        return beyond[nearest[: max(NEAR, len(beyond) // 2)]]


@dataclass(frozen=True)
class LatencyTable:
    """A measured table; see the module. All costs are milliseconds.

    Attributes:
        shape, heads, policy: the student.
        conditions: what it was measured under.
        fixed: embedding, attention blocks, pooler.
        layers: cost of n FFNs at ratio r with nothing between their products.
        parallel: cost that one FFN of the parallel form adds.
        segments: cost per FFN of passing over a segment in use, per element of a token.
        operators: cost per FFN of an operator, per element of a token.
        check: None where it was not checked.
        measured: number of architectures it was made from.
    """

    shape: ModelShape
    heads: int
    policy: str
    conditions: Conditions
    fixed: float
    layers: dict[tuple[int, Fraction], float]
    parallel: float
    segments: dict[str, float]
    operators: dict[str, float]
    check: Check | None = None
    measured: int = 0
    _classes: dict[tuple[Expression, Fraction], float] = field(default_factory=dict, compare=False, repr=False)

    def fit(self, limit: float | None = None) -> bool:
        """Whether a limit of so many milliseconds, or an order by latency, can be trusted to it; see the module."""
        return self.check is not None and bool(self.check.pairs) and self.check.error(limit) <= TRUSTED

    def allowed(self, limit: float) -> float:
        """The most an architecture may be predicted to take where it may take `limit` milliseconds."""
        return limit / (1 + self.check.overrun(limit)) if self.check is not None and self.check.pairs else limit

    def predict(self, arch: Architecture) -> float:
        """Milliseconds of one forward pass.

        Raises:
            UserError: the table has no entry for a (stack, ratio) or an operator, or a layer has fewer heads.
        """
        if len(arch.layers) != self.shape.num_layers:
            raise UserError(f"latency table: is of {self.shape.num_layers} layers, the architecture has {len(arch)}")
        return self.fixed + sum(self.layer(layer) for layer in arch.layers)

    def layer(self, layer: LayerSpec) -> float:
        """Milliseconds of one layer's FFNs; its attention block, with all heads, is part of `fixed`."""
        if layer.heads not in (None, self.heads):
            raise UserError(
                f"latency table: is of layers with all {self.heads} heads, a layer has {layer.heads}: measure such"
                " models themselves"
            )
        if layer.stack == 0:
            return 0.0
        base = self.layers.get((layer.stack, layer.ratio))
        if base is None:
            raise UserError(
                f"latency table: has no entry for stack {layer.stack}, ratio {layer.ratio}: build it for this space"
            )
        key = layer.expression, layer.ratio
        if key not in self._classes:
            self._classes[key] = self._expression(*key)
        return base + layer.stack * self._classes[key]

    def _expression(self, expr: Expression, ratio: Fraction) -> float:
        kind = program_class(expr, self.policy)
        widths = segment_widths(self.shape, ratio)
        cost = self.parallel if kind.parallel else 0.0
        for segment in kind.segments:
            cost += widths[segment] * self.segments[segment]
        for segment, operator, count in kind.operators:
            each = self.operators.get(operator)
            if each is None:
                raise UserError(f"latency table: has no cost of operator {operator}: build it for this space")
            cost += count * widths[segment] * each
        return cost

    def scaled(self, factor: float) -> LatencyTable:
        """The table of a device that is slower by `factor` throughout."""
        return replace(
            self,
            fixed=self.fixed * factor,
            layers={k: v * factor for k, v in self.layers.items()},
            parallel=self.parallel * factor,
            segments={k: v * factor for k, v in self.segments.items()},
            operators={k: v * factor for k, v in self.operators.items()},
            check=None,
            _classes={},
        )

    def save(self, path: Path) -> None:
        """Writes the table as JSON, whole or not at all; the folder must exist."""
        write_json_atomic(
            path,
            {
                "format": FORMAT,
                "shape": _sizes(self.shape),
                "heads": self.heads,
                "policy": self.policy,
                "conditions": asdict(self.conditions),
                "measured": self.measured,
                "fixed_ms": self.fixed,
                "layers_ms": [{"stack": n, "ratio": str(r), "ms": ms} for (n, r), ms in self.layers.items()],
                "parallel_ms": self.parallel,
                "segments_ms": self.segments,
                "operators_ms": self.operators,
                "fit": self.fit(),
                "check": asdict(self.check) if self.check is not None else None,
            },
        )

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """Reads what `save` wrote.

        Raises:
            UserError: there is no such file, or it is damaged.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw["format"] != FORMAT:
                raise ValueError(f"format {raw['format']}")
            return cls(
                shape=ModelShape(**raw["shape"]),
                heads=int(raw["heads"]),
                policy=str(raw["policy"]),
                conditions=Conditions(**raw["conditions"]),
                fixed=float(raw["fixed_ms"]),
                layers={(int(e["stack"]), Fraction(e["ratio"])): float(e["ms"]) for e in raw["layers_ms"]},
                parallel=float(raw["parallel_ms"]),
                segments={name: float(raw["segments_ms"][name]) for name in SEGMENTS},
                operators={str(k): float(v) for k, v in raw["operators_ms"].items()},
                check=_check(raw["check"]),
                measured=int(raw["measured"]),
            )
        except OSError as error:
            raise UserError(
                f"latency table {path}: cannot be read ({error.strerror}): build it with ffnas latency --build-table"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"latency table {path}: is damaged ({error}): build it again") from error


def segment_widths(shape: ModelShape, ratio: Fraction) -> dict[str, int]:
    """Elements per token that an instruction of each segment runs over."""
    inner = inner_width(ratio, shape.ffn_size)
    return {"pre": shape.hidden_size, "mid": inner, "post": shape.hidden_size}


def identity(
    shape: ModelShape, heads: int, policy: str, stacks: tuple[int, ...], ratios: tuple[Fraction, ...], at: Conditions
) -> str:
    """A short hash of everything a table depends on but its numbers; names its file in the cache.

    The CPU kernels' sources are part of it: faster kernels ask for another measurement.
    """
    sources = source_folder()
    kernels = "" if sources is None else source_key(sources)
    sizes = {k: v for k, v in _sizes(shape).items() if k not in ("teacher_hidden_size", "vocab_size")}
    text = json.dumps(
        [FORMAT, kernels, sizes, heads, policy, stacks, [str(r) for r in ratios], asdict(at)], sort_keys=True
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _sizes(shape: ModelShape) -> dict[str, Any]:
    """The sizes as files and names of files have them, which know the heads by another field."""
    sizes = asdict(shape)
    del sizes["num_heads"]
    if shape.trigram:
        del sizes["trigram"]
    return sizes


def _check(raw: dict[str, Any] | None) -> Check | None:
    if raw is None:
        return None
    pairs = tuple((float(p), float(m)) for p, m in raw["pairs"])
    if not all(0 < ms < math.inf for pair in pairs for ms in pair):
        raise ValueError("check.pairs: milliseconds must be positive numbers")
    return Check(pairs, float(raw["rank_correlation"]), float(raw["mean_error"]), float(raw["worst_error"]))
