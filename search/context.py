"""What every part of a run shares: teacher, data, the student's shape, the space, and where results go.

`prepare` loads and checks everything a user can get wrong before a run directory exists, so that a mistake leaves
nothing behind; `Context` is what remains.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.architecture.architecture import Architecture
from engine.architecture.shape import ModelShape
from engine.data import EncodedTask, TaskData, TaskSpec, load_task
from engine.data.describe import describe
from engine.data.mixture import other_tasks
from engine.data.task import NEG_LOG_LOSS
from engine.distill import Distiller, TeacherTargets
from engine.distill.population import Part
from engine.distill.target_cache import BatchPlan, DiskTargets, PartTargets
from engine.errors import UserError
from engine.files import write_json_atomic
from engine.objective import layer_map
from engine.seeding import derive_seed, seed_everything
from engine.student.configuration import FFNASConfig
from engine.student.init import draw_padding_row, init_from_teacher
from engine.student.modeling import FFNASPreTrainedModel
from engine.student.supernet import build_student
from engine.teacher import Teacher
from engine.training.loop import PhaseLog
from engine.training.parallel import ALONE, Ranks
from engine.training.precision import choose_device, choose_precision
from engine.training.sentinel import Sentinel
from kernels.cache import cache_dir
from search.config.checks import check_budget, check_heads
from search.config.distillers import make_distiller
from search.config.identity import facts
from search.config.latency_tables import table_for
from search.config.schema import SearchConfig
from search.config.space import build_space, inherited_space, student_fields, student_shape
from search.console.environment import unused_gpu
from search.console.progress import Reporter
from search.ledger.board import Board, LocalBoard, RankBoard
from search.ledger.joined import load_awaited
from search.ledger.ledger import Ledger
from search.ledger.shared_board import LedgerBoard
from search.rundir import RunDir
from search.samplers import SAMPLERS
from search.space import SearchSpace
from search.tracking import Scalars

MEMORY_LIMIT = 2 << 30
"""Bytes of teacher's answers kept in memory per phase."""


@dataclass
class Prepared:
    """Checked input of a run: nothing of it has been written anywhere.

    Attributes:
        config: resolved configuration (device and precision decided).
        device: where models run.
        teacher: as loaded, not yet fine-tuned.
        task: the task's rows and specification.
        data: the splits and the warm-up text, tokenized for the teacher's vocabulary.
        shape: the student's shape.
        space: the joint search space (expressions, stacks, ratios).
        ranks: the processes of the run; this one among them.
        others: further tasks of stage 3, by name.
    """

    config: SearchConfig
    device: torch.device
    teacher: Teacher
    task: TaskData
    data: EncodedTask
    shape: ModelShape
    space: SearchSpace
    ranks: Ranks
    others: dict[str, EncodedTask]

    @property
    def spec(self) -> TaskSpec:
        """The task's specification."""
        return self.task.spec

    @property
    def score_spec(self) -> TaskSpec:
        """The task with the metric that candidates are scored by."""
        return scored(self.spec, self.config)

    @property
    def precision(self) -> str:
        """`"fp32"` or `"bf16"`."""
        return self.config.precision

    def seed(self, *names: object) -> int:
        """The seed of a phase or trial, by name."""
        return derive_seed(self.config.seed, *names)


def prepare(config: SearchConfig, reporter: Reporter, ranks: Ranks = ALONE, task: TaskData | None = None) -> Prepared:
    """Loads teacher and data and builds the space; shows what was understood of the data.

    Of several ranks, only the first measures which precision is faster (the others say fp32): `agree_on` follows.

    Args:
        config: as read.
        reporter: shows the data, and what was chosen for the user.
        ranks: the processes of the run.
        task: the task of `config.data` and `config.seed`, where it has been read already.

    Raises:
        UserError: something in the configuration does not fit the teacher, the data or the machine.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    hint = unused_gpu() if config.device == "auto" else None
    if hint is not None:
        reporter.info(hint)
    if ranks.size > 1 and device.type == "cuda":
        device = torch.device("cuda", ranks.local)
    config.data.validate()
    if config.sampler.name not in SAMPLERS:
        raise UserError(f"sampler.name: {config.sampler.name!r} is not known: choose one of {', '.join(SAMPLERS)}")
    task = task or load_task(config.data, seed=config.seed)
    reporter.doing("loading the teacher")
    scored(task.spec, config)  # refuses what does not fit before the teacher is loaded
    paper = config.strategy == "paper" or config.kd.paper_exact
    wanted = not paper and task.spec.head.inherits
    exact = config.kd.paper_exact
    options = {"device": device, "seed": config.seed, "standard": wanted, "published": exact}
    teacher = Teacher.load(config.teacher, task=task.spec, **options)
    config = replace(config, strategy=_strategy(config, teacher, task.spec, reporter))
    check_budget(config)
    if config.strategy == "inherit" and ranks.size > 1:
        raise UserError("strategy: inherit is one process: start it without torchrun, or use --strategy paper")
    reporter.doing("tokenizing")
    positions = {"max_positions": teacher.max_positions, "published": exact}
    data = task.encode(teacher.tokenizer, config.data.max_length, **positions)
    if ranks.is_first:
        for line in describe(task, config.data.max_length, teacher.tokenizer):
            reporter.info(line)
    others = other_tasks(config.data, teacher.tokenizer, teacher.max_positions, config.seed, published=exact)
    if config.strategy == "inherit":
        shape = replace(teacher.model.config.shape, num_heads=teacher.num_heads, teacher_hidden_size=None)
        space, heads = inherited_space(shape), teacher.num_heads
    else:
        shape, space, heads = _paper_space(config, teacher, reporter)
    reporter.doing("trying precisions")
    precision, teacher_precision = config.precision, config.teacher_precision
    if not ranks.is_first:
        precision = teacher_precision = "fp32"
    precision = choose_precision(precision, device, shape.hidden_size, shape.ffn_size, heads)
    inner = getattr(teacher.model.config, "intermediate_size", 4 * teacher.hidden_size)
    teacher_precision = choose_precision(
        teacher_precision, device, teacher.hidden_size, inner, teacher.num_heads, training=False
    )
    config = replace(config, device=str(device), precision=precision, teacher_precision=teacher_precision)
    return Prepared(config, device, teacher, task, data, shape, space, ranks, others)


def teacher_cache() -> Path:
    """The folder that fine-tuned teachers are kept in."""
    return cache_dir() / "teachers"


def _strategy(config: SearchConfig, teacher: Teacher, spec: TaskSpec, reporter: Reporter) -> str:
    """`"inherit"` or `"paper"`.

    Raises:
        UserError: inherit is asked for and the teacher's layers cannot be taken over.
    """
    if config.strategy == "paper":
        return "paper"
    reason = None
    if config.kd.paper_exact:
        reason = "kd.paper_exact is for the paper's strategy"
    elif not teacher.is_standard:
        reason = teacher.notes[-1] if teacher.notes else "the teacher's family is not known"
    elif not one_ffn_per_layer(teacher.model.config):
        reason = f"teacher {teacher.name!r} is no plain encoder of one FFN per layer"
    if not spec.head.inherits:
        reason = f"a {spec.kind} task is not served yet"
    if reason is None:
        return "inherit"
    if config.strategy == "inherit":
        raise UserError(f"strategy: inherit cannot be used, {reason}: use --strategy paper")
    reporter.info(f"strategy: paper, since {reason}")
    return "paper"


def one_ffn_per_layer(config: FFNASConfig) -> bool:
    """Whether every layer has all its heads and one FFN of the full width, the same in all layers."""
    layers = config.full_architecture.layers
    return all((s.stack, s.ratio, s.heads) == (1, 1, None) and s.expression.weight == "wb2" for s in layers) and (
        len({s.expression for s in layers}) == 1
    )


def _paper_space(config: SearchConfig, teacher: Teacher, reporter: Reporter) -> tuple[ModelShape, SearchSpace, int]:
    """The student's shape, the joint space and the number of heads of the paper's strategy."""
    student = config.student
    heads = student.num_heads or teacher.num_heads
    check_heads(student.hidden_size, heads)
    layer_map(student.num_layers, teacher.num_layers)
    shape = student_shape(config, teacher.model.config.vocab_size, teacher.hidden_size)
    space = build_space(config, shape)
    if config.objectives.needs_latency(config.budget):
        table = table_for(config, space, heads, reporter)
        space = build_space(config, shape, table)
    return shape, space, heads


def scored(spec: TaskSpec, config: SearchConfig) -> TaskSpec:
    """The task with the metric that candidates are scored by.

    Raises:
        UserError: it is none of a task of this kind.
    """
    chosen = config.objectives.score
    if chosen == "smooth":
        chosen = NEG_LOG_LOSS if NEG_LOG_LOSS in spec.metrics else "metric"
    if chosen == "metric":
        return spec
    if chosen not in spec.metrics:
        raise UserError(f"objectives.score: {chosen!r} is none of a {spec.kind} task: use metric")
    return replace(spec, metric=chosen)


def agree_on(prepared: Prepared) -> None:
    """Gives every rank the precision the first one decided on."""
    config = prepared.config
    names = ("precision", "teacher_precision")
    chosen = prepared.ranks.agree(lambda: {name: getattr(config, name) for name in names})
    prepared.config = replace(config, **chosen)


@dataclass
class Context(Prepared):
    """A run in progress.

    Attributes:
        rundir, ledger, reporter: where results go.
        scalars: trackers, where wanted.
        joined: run directory of the search this process helps; its weights are waited for and read from there.
        seconds: wall time per finished phase; kept in phases.json, so a resumed run reports the whole time.
        proxy_targets: the teacher's answers for proxy training by what decides its batches (`search.scoring.proxy`).
        counts_time: whether phases add their time; not where several run at once, whose time is counted in one.
    """

    rundir: RunDir
    ledger: Ledger
    reporter: Reporter
    scalars: Scalars | None = None
    joined: Path | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    proxy_targets: dict[tuple[object, ...], TeacherTargets] = field(default_factory=dict)
    counts_time: bool = True
    _targets: dict[str, PartTargets | DiskTargets] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self._phases.exists():
            try:
                self.seconds = {str(k): float(v) for k, v in json.loads(self._phases.read_text()).items()}
            except (OSError, ValueError, TypeError, AttributeError):  # times are for the reader, results need none
                self.reporter.info(f"{self._phases} is damaged: times are counted from here")

    @property
    def _phases(self) -> Path:
        return self.rundir.path / "phases.json"

    def board(self, stage: str, model: nn.Module) -> Board:
        """Who evaluates which candidates of `stage`; `model` is what their first weights come from."""
        if self.ledger.shared:
            table = self.space.limits.costs.table if self.space.limits is not None else None
            depends = facts(self.config, self.data, self.teacher.model, model, table)
            return LedgerBoard(self.ledger, stage, depends)
        if self.ranks.size > 1:
            return RankBoard(self.ranks, self.ledger, stage)
        return LocalBoard(self.ledger, stage)

    @property
    def inherits(self) -> bool:
        """Whether students are made of the teacher's own layers."""
        return self.config.strategy == "inherit"

    @cached_property
    def text_teacher(self) -> Teacher:
        """Who teaches on text: the teacher of the task, or the one it was before fine-tuning (`kd.text_teacher`)."""
        if self.config.kd.text_teacher == "finetuned":
            return self.teacher
        return Teacher.load(self.config.teacher, device=self.device, published=self.config.kd.paper_exact)

    def distiller(self, part: Part = "task", *, stage: bool = False) -> Distiller:
        """Teacher, layer map and objective for this run's student; on text, with the teacher for that."""
        teacher = self.text_teacher if part == "text" and not self.inherits else self.teacher
        return make_distiller(self.config, teacher, self.shape.num_layers, self.spec, self.device, stage=stage)

    @cached_property
    def sentinel(self) -> Sentinel | None:
        """Compares backends at the beginning of phases, where wanted; one for the run, which knows what it compared."""
        if not self.config.sentinel:
            return None
        return Sentinel(self.device, self.precision, self.reporter.info)

    def targets(self, name: str, *, need_logits: bool, plan: BatchPlan) -> PartTargets | DiskTargets:
        """The teacher's answers for the batches of `name`, shared by all who ask for that name in this run.

        `plan` says which batches those are; the plan of the first to ask counts.
        """
        if name not in self._targets:
            settings, distiller = self.config.targets, self.distiller("task" if need_logits else "text")
            if settings.cache == "disk":
                self._targets[name] = DiskTargets(
                    distiller,
                    need_logits=need_logits,
                    plan=plan,
                    folder=Path(settings.folder) if settings.folder else cache_dir() / "targets",
                    dtype=settings.dtype,
                    note=self.reporter.info,
                )
            else:
                limit = MEMORY_LIMIT // plan.micro_batches if settings.cache == "memory" else 0
                self._targets[name] = PartTargets(
                    lambda: TeacherTargets(distiller, need_logits=need_logits, limit_bytes=limit)
                )
        return self._targets[name]

    def new_student(
        self, architecture: Architecture, name: str, spec: TaskSpec | None = None, **fields: Any
    ) -> FFNASPreTrainedModel:
        """A student for `architecture` on the run's device, freshly initialised with the seed of `name`.

        Its head is for the run's task, or for the one given; `fields` of its configuration win over the run's.
        """
        seed_everything(self.seed(name, "init"))
        student = self.config.student
        model = build_student(
            self.shape,
            architecture,
            student.num_heads or self.teacher.num_heads,
            spec or self.spec,
            policy=self.space.policy,
            pad_token_id=self.teacher.tokenizer.pad_token_id,
            **student_fields(self.config) | fields,
        )
        if student.init == "teacher":
            init_from_teacher(model, self.teacher.model)
        if self.config.kd.paper_exact:
            draw_padding_row(model)
        return model.to(self.device)

    def load_joined(self, name: str | Path, model: nn.Module) -> None:
        """The weights file `name` of the joined search, loaded into `model` (`search.ledger.joined`)."""
        if self.joined is None:
            raise RuntimeError("no search was joined")
        load_awaited(self.joined, name, model, self.reporter)

    def log_phase(self, line: PhaseLog) -> None:
        """Appends one line of mean losses to log.jsonl and, where wanted, to the trackers."""
        self.rundir.log({"phase": line.phase, "step": line.step, "seconds": line.seconds, **line.losses})
        if self.scalars is not None:
            self.scalars.phase(line)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the wall time of the block, if it finishes, to `seconds[name]`; the user is told what is done."""
        self.reporter.doing(name)
        began = time.monotonic()
        yield
        if not self.counts_time:
            return
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
        write_json_atomic(self._phases, self.seconds)
