"""The supernet that the search benchmarks score: the demo's student, trained by the search's own stage-3 code.

Data, teacher and sizes are the demo preset's (H = 192, 3 layers, embedded three-class sentiment); the expressions are
the first three of EfficientBERT's released architecture; the task phase is longer than the demo's, so that scores tell
candidates apart. Subnets are drawn from all 16^3 (stack, ratio) choices. Weights are kept in the cache folder, by the
settings they depend on; making them takes about three minutes on two cores.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from fractions import Fraction
from pathlib import Path

from engine.architecture import Architecture, LayerSpec
from engine.student import FFNASForSequenceClassification
from kernels.cache import cache_dir
from kernels.expression import parse_expression
from search.context import Context, prepare
from search.ledger import Ledger
from search.libraries import quiet
from search.options import parse, save_config
from search.pipeline import teach
from search.progress import Reporter
from search.rundir import RunDir
from search.space import SearchSpace
from search.stages import stage3_supernet, warm_up

EXPRESSIONS = (
    "tanh(linear(gelu(linear(x,wb1)),wb2))",
    "elu(linear(gelu(linear(x,wb1)),wb2))",
    "sigmoid(linear(relu(linear(x,wb1)),wb2))",
)
OPTIONS = (
    *("--preset", "demo", "--device", "cpu", "--teacher_precision", "fp32", "--tensorboard", "false"),
    *("--budget.params", "0", "1e9"),
    *("--stage3.text.steps", "60", "--stage3.task.steps", "500", "--stage3.task.lr", "1e-3"),
)
SPLIT = "score"
"""Which split of the demo's data scores candidates: 596 sentences."""


class Supernet:
    """The trained supernet and what scoring needs.

    Attributes:
        model: in eval mode, fp32, on the CPU.
        ctx: data, task and settings.
        space: all 16^3 (stack, ratio) choices.
        budgeted: the middle third of the parameter counts, as a search without a budget of its own has it.
    """

    def __init__(self) -> None:
        quiet()
        config, _ = parse([*OPTIONS])
        reporter = Reporter()
        prepared = prepare(config, reporter)
        tag = hashlib.sha256(json.dumps([OPTIONS, EXPRESSIONS]).encode()).hexdigest()[:16]
        folder: Path = cache_dir() / "benchmarks" / f"supernet-{tag}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        winner = Architecture(tuple(LayerSpec(parse_expression(e), 4, Fraction(1)) for e in EXPRESSIONS))
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
        expressions = tuple(layer.expression for layer in winner.layers)
        self.budgeted = SearchSpace(self.ctx.shape).with_expressions(expressions)
