"""What a run works on: teacher, data, the student's shape and the space, checked before anything is written.

`prepare` loads and checks everything a user can get wrong before a run directory exists, so that a mistake leaves
nothing behind.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.architecture.shape import ModelShape
from engine.data import EncodedTask, TaskData, TaskSpec, load_task
from engine.data.describe import describe
from engine.data.mixture import other_tasks
from engine.data.task import NEG_LOG_LOSS
from engine.errors import UserError
from engine.objective import layer_map
from engine.seeding import derive_seed
from engine.student.configuration import FFNASConfig
from engine.teacher import Teacher
from engine.training.parallel import ALONE, Ranks
from engine.training.precision import choose_device, choose_precision
from kernels.cache import cache_dir
from search.config.checks import check_budget, check_heads
from search.config.latency_tables import table_for
from search.config.schema import SearchConfig
from search.config.space import build_space, inherited_space, student_shape
from search.console.environment import unused_gpu
from search.console.progress import Reporter
from search.samplers import SAMPLERS
from search.space import SearchSpace


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
    device = _device(config, ranks, reporter)
    config.data.validate()
    if config.sampler.name not in SAMPLERS:
        raise UserError(f"sampler.name: {config.sampler.name!r} is not known: choose one of {', '.join(SAMPLERS)}")
    task = task or load_task(config.data, seed=config.seed)
    reporter.doing("loading the teacher")
    scored(task.spec, config)  # refuses what does not fit before the teacher is loaded
    teacher = _teacher(config, task.spec, device)
    config = replace(config, strategy=_strategy(config, teacher, task.spec, reporter))
    check_budget(config)
    if config.strategy == "inherit" and ranks.size > 1:
        raise UserError("strategy: inherit is one process: start it without torchrun, or use --strategy paper")
    reporter.doing("tokenizing")
    data, others = _tokenized(config, task, teacher)
    if ranks.is_first:
        for line in describe(task, config.data.max_length, teacher.tokenizer):
            reporter.info(line)
    if config.strategy == "inherit":
        shape, space, heads = _inherited_space(teacher)
    else:
        shape, space, heads = _paper_space(config, teacher, reporter)
    reporter.doing("trying precisions")
    config = _with_precisions(config, device, teacher, shape, heads, measure=ranks.is_first)
    return Prepared(config, device, teacher, task, data, shape, space, ranks, others)


def _device(config: SearchConfig, ranks: Ranks, reporter: Reporter) -> torch.device:
    """Where this process works; tells of a GPU that is left unused."""
    device = choose_device(config.device)
    hint = unused_gpu() if config.device == "auto" else None
    if hint is not None:
        reporter.info(hint)
    return torch.device("cuda", ranks.local) if ranks.size > 1 and device.type == "cuda" else device


def _teacher(config: SearchConfig, spec: TaskSpec, device: torch.device) -> Teacher:
    """The teacher, as a model of ours where strategy inherit may need it so."""
    exact = config.kd.paper_exact
    standard = config.strategy != "paper" and not exact and spec.head.inherits
    return Teacher.load(config.teacher, task=spec, device=device, seed=config.seed, standard=standard, published=exact)


def _tokenized(config: SearchConfig, task: TaskData, teacher: Teacher) -> tuple[EncodedTask, dict[str, EncodedTask]]:
    """The task in the teacher's vocabulary, and the further tasks of stage 3."""
    exact, positions = config.kd.paper_exact, teacher.max_positions
    data = task.encode(teacher.tokenizer, config.data.max_length, max_positions=positions, published=exact)
    return data, other_tasks(config.data, teacher.tokenizer, positions, config.seed, published=exact)


def _with_precisions(
    config: SearchConfig, device: torch.device, teacher: Teacher, shape: ModelShape, heads: int, *, measure: bool
) -> SearchConfig:
    """The configuration with device and precisions decided; without `measure` fp32 stands for "auto"."""
    own, teachers = (config.precision, config.teacher_precision) if measure else ("fp32", "fp32")
    own = choose_precision(own, device, shape.hidden_size, shape.ffn_size, heads)
    inner = getattr(teacher.model.config, "intermediate_size", 4 * teacher.hidden_size)
    teachers = choose_precision(teachers, device, teacher.hidden_size, inner, teacher.num_heads, training=False)
    return replace(config, device=str(device), precision=own, teacher_precision=teachers)


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


def _inherited_space(teacher: Teacher) -> tuple[ModelShape, SearchSpace, int]:
    """The same of strategy inherit: the teacher's own shape."""
    shape = replace(teacher.model.config.shape, num_heads=teacher.num_heads, teacher_hidden_size=None)
    return shape, inherited_space(shape), teacher.num_heads


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
