"""The supernet that the search benchmarks score: the demo's student, trained by the search's own stage-3 code.

Data, teacher and sizes are the demo preset's (H = 192, 3 layers, embedded three-class sentiment); the expressions are
the first three of EfficientBERT's released architecture. Training is the demo's too, but for one thing: subnets are
drawn from all 16^3 (stack, ratio) choices. Weights are kept in the cache folder; making them takes a minute or two.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from engine.architecture.architecture import Architecture, LayerSpec
from engine.data import EncodedDataset
from engine.student import FFNASForSequenceClassification
from kernels.cache import cache_dir
from kernels.language.expression import parse_expression
from search.config.options import parse, save_config
from search.console.libraries import quiet
from search.console.progress import Reporter
from search.context import Context, prepare
from search.ledger.ledger import Ledger
from search.pipeline import teach
from search.rundir import RunDir
from search.space import SearchSpace
from search.stages import stage3_supernet, warm_up

EXPRESSIONS = (
    "tanh(linear(gelu(linear(x,wb1)),wb2))",
    "elu(linear(gelu(linear(x,wb1)),wb2))",
    "sigmoid(linear(relu(linear(x,wb1)),wb2))",
)
OTHER_EXPRESSIONS = (
    "linear(gelu(linear(max(x,tanh(x)),wb1)),wb2)",
    "linear(relu(mul(linear(x,wb1),x)),wb2)",
    "leaky_relu(linear(gelu(linear(x,wb1)),wb2))",
)
"""The last three of that architecture."""
OPTIONS = (
    *("--preset", "demo", "--device", "cpu", "--teacher_precision", "fp32", "--tracker", "none"),
    *("--budget.params", "0", "1e9"),
)
SPLITS = ("score", "select", "dev")
"""Splits of the demo's data that training does not see: 596, 596 and 2000 sentences. The first scores candidates."""


class Supernet:
    """The trained supernet and what scoring needs.

    Args:
        expressions: one per layer.

    Attributes:
        model: in eval mode, fp32, on the CPU.
        ctx: data, task and settings.
        space: all 16^3 (stack, ratio) choices.
        budgeted: the middle third of the parameter counts, as a search without a budget of its own has it.
    """

    def __init__(self, expressions: Sequence[str] = EXPRESSIONS) -> None:
        quiet()
        config, _ = parse([*OPTIONS])
        reporter = Reporter()
        prepared = prepare(config, reporter)
        tag = hashlib.sha256(json.dumps([OPTIONS, tuple(expressions)]).encode()).hexdigest()[:16]
        folder: Path = cache_dir() / "benchmarks" / f"supernet-{tag}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        winner = Architecture(tuple(LayerSpec(parse_expression(e), 4, Fraction(1)) for e in expressions))
        with contextlib.ExitStack() as stack:
            rundir = RunDir(folder)
            known = rundir.config.is_file()
            stack.enter_context(rundir.open(resume=known))
            if not known:
                save_config(prepared.config, rundir.config)
            ledger = stack.enter_context(Ledger(rundir.ledger))
            self.ctx = Context(**vars(prepared), rundir=rundir, ledger=ledger, reporter=reporter)
            self.ctx.teacher = teach(self.ctx, reporter)
            model, self.space = stage3_supernet(self.ctx, warm_up(self.ctx), winner)
        assert isinstance(model, FFNASForSequenceClassification)
        self.model = model.eval()
        self.budgeted = SearchSpace(self.ctx.shape).with_expressions([layer.expression for layer in winner.layers])

    def held_out(self) -> EncodedDataset:
        """The sentences of all `SPLITS`, one after the other."""
        parts: list[EncodedDataset] = [getattr(self.ctx.data, name) for name in SPLITS]
        ends = np.cumsum([0, *(part.num_tokens for part in parts)])
        return replace(
            parts[0],
            tokens=np.concatenate([part.tokens for part in parts]),
            offsets=np.concatenate([[0], *(part.offsets[1:] + end for part, end in zip(parts, ends, strict=False))]),
            second=np.concatenate([part.second for part in parts]),
            labels=np.concatenate([part.labels for part in parts]),
            truncated=0,
            _hash=[],
        )
