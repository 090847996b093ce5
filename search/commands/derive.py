"""`ffnas derive`: distils a given architecture from a teacher on a task, without a search.

    ffnas derive --preset efficientbert-tiny --data.train a.csv --data.dev b.csv
    ffnas derive --architecture runs/NAME/best/architecture.json
    ffnas derive --preset efficientbert --settings paper --data.task glue/mnli
    ffnas derive --resume runs/NAME

Every option of `ffnas search` that a derivation can use is taken. What is not given follows the size of the data
(`search.config.derive_settings`) and the demo, whose teacher is an installed package. `--settings paper` is the
authors' recipe, from the hub; `--settings NAME` another preset of `ffnas search`. The teacher is fine-tuned first and
cached.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.architecture.architecture import Architecture
from engine.architecture.file import load_architecture, names_file
from engine.errors import ToldElsewhere, UserError
from engine.files import write_json_atomic
from engine.published.presets import ModelPreset, get_preset
from search.console.arguments import QuietParser

if TYPE_CHECKING:
    import numpy as np

    from engine.data import TaskData
    from engine.student.modeling import FFNASPreTrainedModel
    from engine.training.parallel import Ranks
    from engine.training.settings import PhaseSettings
    from search.config.schema import SearchConfig
    from search.console.progress import Reporter
    from search.context import Context

PLAN = "derive.json"
FRESH, WARMUP = "fresh", "warmup"
BY_SIZE, BY_SIZE_PRESET = "auto", "demo"


@dataclass(frozen=True)
class Plan:
    """What is derived, beside the configuration.

    Attributes:
        architecture: of the model.
        preset: name of the preset it came from, or None.
        start: `fresh`, `warmup`, or the path of weights to slice.
    """

    architecture: Architecture
    preset: str | None
    start: str


def command(argv: list[str]) -> None:
    """Runs or resumes a derivation; raises `UserError` before anything is written when the input is wrong."""
    from search.commands.finished_run import is_finished
    from search.config.inputs import read_inputs
    from search.console.progress import is_first, reporter_of_rank

    with reporter_of_rank() as reporter:
        try:
            config, plan, resume = read(argv)
            if is_finished(resume, config.files):
                return
            reporter.doing("reading the data")
            task = read_inputs(config)  # mistakes in files are told before frameworks are loaded
            if resume is None:
                config, plan, _ = read(argv, task)
        except UserError as error:
            if is_first():
                raise
            raise ToldElsewhere(str(error)) from error

        reporter.doing("loading PyTorch")
        import torch

        from engine.training.parallel import join

        with join(cuda=config.device != "cpu" and torch.cuda.is_available()) as ranks:
            _derive(config, plan, resume, ranks, task, reporter)


def read(argv: list[str], task: TaskData | None = None) -> tuple[SearchConfig, Plan, Path | None]:
    """The configuration, what to derive, and the run directory to resume, if any.

    Args:
        argv: the command line.
        task: the data it names, once that is read: phases left open follow its size.

    Raises:
        UserError: an option or file is wrong, or the architecture and the sizes do not fit.
    """
    from search.config.options import parse

    parser = QuietParser(prog="ffnas derive", allow_abbrev=False, epilog="All other options: ffnas search --help-all.")
    parser.add_argument("--preset", help="sizes, architecture and recipe of a preset (`ffnas presets`)")
    parser.add_argument("--architecture", help="architecture file, or text such as 'linear4_2(gelu(...)), ...'")
    parser.add_argument(
        "--settings",
        default=BY_SIZE,
        help="what the other options start from: auto, by the size of the data (default); paper, the authors' recipe,"
        " for GPUs, with BERT-base and Wikipedia from the hub; or another preset of ffnas search",
    )
    parser.add_argument(
        "--start",
        help="first weights: fresh, warmup (a supernet is distilled on text first), a model directory, a published"
        " checkpoint, or a supernet's *.safetensors in a run directory (default: the preset's with settings paper,"
        " otherwise fresh)",
    )
    parser.add_argument("--resume", help="run directory to continue; takes its own configuration")
    options, rest = parser.parse_known_args(argv)
    if options.resume is not None:
        if rest or options.preset or options.architecture or options.start:
            raise UserError("--resume takes the run's own configuration: give no other option with it")
        folder = Path(options.resume)
        plan = _read_plan(folder)
        config, _ = parse(["--resume", str(folder)], prog="ffnas derive")
        return config, plan, folder
    if (options.preset is None) == (options.architecture is None):
        raise UserError("give exactly one of --preset and --architecture (or --resume)")
    preset = None if options.preset is None else get_preset(options.preset)
    architecture, sizes = _architecture(options.architecture) if preset is None else _preset(preset)
    start = options.start or (preset.recipe.start if preset is not None and options.settings == "paper" else FRESH)
    by_size = options.settings == BY_SIZE
    # the given sizes count, not the teacher's, which strategy inherit would take
    base = ["--preset", BY_SIZE_PRESET if by_size else options.settings, "--strategy", "paper", *sizes]
    recipe = _recipe(preset, rest) if preset is not None and options.settings == "paper" else []
    config, _ = parse([*base, *recipe, *rest], prog="ffnas derive")
    if by_size and task is not None:
        config, _ = parse([*base, *_by_size(config, task, start), *rest], prog="ffnas derive")
    if config.student.num_layers != len(architecture):
        raise UserError(f"student.num_layers: {config.student.num_layers}, the architecture has {len(architecture)}")
    if preset is not None and preset.recipe.start == "supernet" and start in (FRESH, WARMUP, "supernet"):
        raise UserError(
            f"--start: {preset.name} starts from the weights of a multi-task supernet: give its stage3/supernet"
            ".safetensors, its directory, or a published checkpoint"
        )
    if start not in (FRESH, WARMUP):
        if not Path(start).exists():
            raise UserError(f"--start: {start!r} is neither fresh, warmup, a file nor a directory: check the path")
        start = str(Path(start).absolute())  # a resumption may begin in another folder
    return config, Plan(architecture, options.preset, start), None


def _by_size(config: SearchConfig, task: TaskData, start: str) -> list[str]:
    from search.config.derive_settings import by_size

    return by_size(
        task,
        max_length=config.data.max_length,
        hidden_size=config.student.hidden_size,
        fresh=start == FRESH,
        own_text=bool(config.data.text),
    )


def told(config: SearchConfig, plan: Plan) -> list[str]:
    """What is about to be done, and which options change it, for the terminal."""
    task, text = config.derive.task, config.derive.text
    first = {FRESH: "fresh weights", WARMUP: "a supernet warmed up on text"}.get(plan.start, plan.start)
    lines = [
        f"derive: {plan.preset or 'the given architecture'} from {first}; teacher {config.teacher}, fine-tuned on the"
        " task first (--teacher for another)"
    ]
    if text.steps == 0:
        lines.append("text: none, so distilled on the task alone (--data.text FILE for text of yours)")
    else:
        source = ", ".join(config.data.text) if config.data.text else "the task's own"
        lines.append(f"text: {source}, {_amount(text)} (--derive.text.steps, .batch_size, .lr)")
    return [*lines, f"task: {_amount(task)} (--derive.task.steps, .batch_size, .lr)"]


def _amount(phase: PhaseSettings) -> str:
    count = f"{phase.epochs:g} epochs in batches" if phase.steps is None else f"{phase.steps} steps"
    return f"{count} of {phase.batch_size}, learning rate {phase.lr:.2g}"


def _preset(preset: ModelPreset) -> tuple[Architecture, list[str]]:
    values = preset.student_config()
    assert preset.architecture is not None
    return preset.architecture, [
        *("--student.hidden_size", str(values["hidden_size"])),
        *("--student.num_layers", str(values["num_hidden_layers"])),
        *("--student.num_heads", str(values["num_attention_heads"])),
        *("--student.ffn_size", str(values["intermediate_size"])),
        *("--student.embedding", str(values["embedding_type"])),
        *("--student.embedding_size", str(values["embedding_size"])),
        *("--student.layer_norm_eps", str(values["layer_norm_eps"])),
        *("--space.policy", preset.policy),
        *("--budget.params", "null"),
    ]


def _recipe(preset: ModelPreset, rest: list[str]) -> list[str]:
    """The preset's distillation for the task the options name."""
    source = next((b for a, b in itertools.pairwise(rest) if a in ("--data.train", "--data.task")), "")
    task, text = preset.recipe.task_phase(source), preset.recipe.text
    phases = (("text", text), ("task", task))
    return [
        word
        for name, phase in phases
        for field in ("epochs", "batch_size", "lr", *(("sources",) if phase.sources is not None else ()))
        for word in (f"--derive.{name}.{field}", str(getattr(phase, field)))
    ]


def _architecture(given: str) -> tuple[Architecture, list[str]]:
    """From a file (its sizes become the student's, unless overridden) or text."""
    budget = ["--budget.params", "null"]
    if not names_file(given):
        architecture = Architecture.parse(given)
        return architecture, ["--student.num_layers", str(len(architecture)), *budget]
    architecture = load_architecture(given)
    data = json.loads(Path(given).read_text(encoding="utf-8"))
    sizes = ["--student.hidden_size", str(data["hidden_size"]), "--student.num_layers", str(len(architecture))]
    return architecture, [*sizes, *budget]


def _read_plan(folder: Path) -> Plan:
    try:
        values = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        return Plan(Architecture.parse(values["architecture"]), values["preset"], values["start"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--resume {folder}: no readable {PLAN} there: give the folder of an earlier derivation"
        ) from error


def _derive(
    config: SearchConfig, plan: Plan, resume: Path | None, ranks: Ranks, task: TaskData, reporter: Reporter
) -> None:
    from search.config.options import placed, save_config
    from search.console.libraries import quiet
    from search.context import Context, agree_on, prepare
    from search.ledger.ledger import Ledger
    from search.rundir import RunDir, default_name
    from search.tracking import open_scalars

    quiet()
    prepared = ranks.together(lambda: prepare(config, reporter, ranks, task))
    agree_on(prepared)
    config = prepared.config = placed(prepared.config)
    path = resume or Path(config.runs) / (config.name or default_name(plan.preset or "derive", config.runs))
    with contextlib.ExitStack() as stack:
        if ranks.is_first:
            opened = ranks.first(lambda: stack.enter_context(RunDir(path).open(resume=resume is not None)))
            assert opened is not None
            rundir = opened
        else:
            ranks.first(lambda: None)
            elsewhere = stack.enter_context(tempfile.TemporaryDirectory(prefix="ffnas-rank-"))
            rundir = stack.enter_context(RunDir(elsewhere).open())
        if resume is None and ranks.is_first:
            write_json_atomic(
                rundir.path / PLAN,
                {"architecture": str(plan.architecture), "preset": plan.preset, "start": plan.start},
            )
            save_config(config, rundir.config)
        ledger = stack.enter_context(Ledger(rundir.ledger))
        scalars = open_scalars(config, rundir.path, reporter.info) if ranks.is_first else None
        if scalars is not None:
            stack.callback(scalars.close)
        reporter.info(f"run directory: {rundir.path}")
        for line in told(config, plan):
            reporter.info(line)
        run(Context(**vars(prepared), rundir=rundir, ledger=ledger, reporter=reporter, scalars=scalars), plan)
    reporter.info(f"model:  {rundir.model}")
    reporter.info(f"report: {rundir.report}")


def run(ctx: Context, plan: Plan) -> dict[str, Any]:
    """Teacher, first weights, distillation, export, report; finished phases are read back from the run directory."""
    from engine.evaluation.evaluation import evaluate_dev
    from search.derive import derive
    from search.evidence import gather_run
    from search.finished import remove_spent
    from search.pipeline import export, score_line, share_teacher, subjects, track_scores, write_card
    from search.report import build_report
    from search.summary import summarise

    with ctx.timed("teacher"):
        share_teacher(ctx)
    metrics: dict[str, float] = {}
    rows: list[np.ndarray] = []
    if ctx.ranks.is_first:
        with ctx.timed("teacher evaluation"):
            metrics = evaluate_dev(
                ctx.teacher.model, ctx.data, precision=ctx.config.teacher_precision, keep=rows.append
            )
        ctx.reporter.info(score_line("teacher", ctx, metrics))
    best = derive(ctx, "derive", _first_weights(ctx, plan), plan.architecture)
    ctx.reporter.info(score_line("derived model", ctx, best.dev))

    def finish() -> dict[str, Any]:
        found = {"architecture from": plan.preset or "the command line, without a search", "first weights": plan.start}
        export(ctx, best, found)
        evidence = gather_run(ctx, subjects(ctx, best, {}, rows))
        write_card(ctx, best, found, evidence)
        summary = {**summarise(ctx, best, {}, metrics, {}), "evidence": evidence}
        write_json_atomic(ctx.rundir.path / "summary.json", summary)
        track_scores(ctx, metrics, {"found": best})
        build_report(ctx.rundir.path)
        remove_spent(ctx.rundir, ctx.config.files, ctx.reporter)
        return summary

    return ctx.ranks.first(finish) or {}


def _first_weights(ctx: Context, plan: Plan) -> FFNASPreTrainedModel:
    """A student of the architecture whose encoder has the plan's weights, the same on every rank."""
    from engine.student.supernet import inherit
    from engine.teacher.loading import placed
    from search.stages import largest, warm_up

    if plan.start not in (FRESH, WARMUP):
        given = _given_weights(ctx, plan)
        placed(given, ctx.device)
        own = Path(plan.start).suffix == ".safetensors"  # of a run: a weights file alone does not tell its epsilon
        fields: dict[str, Any] = {} if own else {"layer_norm_eps": given.config.layer_norm_eps}
        model = ctx.new_student(plan.architecture, "derive", **fields)
        inherit(model, given)
        return model
    model = ctx.new_student(plan.architecture, "derive")
    if plan.start == WARMUP:
        expressions = tuple(layer.expression for layer in plan.architecture.layers)
        inherit(model, warm_up(ctx, largest(ctx, expressions)))
    return model


def _given_weights(ctx: Context, plan: Plan) -> FFNASPreTrainedModel:
    from engine.export.saved import load_saved
    from engine.published.convert import from_published
    from engine.published.files import read_published

    path = Path(plan.start)
    if path.is_dir():
        return load_saved(path)
    tensors = read_published(path)
    heads = ctx.config.student.num_heads or ctx.teacher.num_heads
    encoder = {name: t for name, t in tensors.items() if name.startswith(("embeddings.", "encoder.", "fit_dense."))}
    return from_published(
        encoder, plan.architecture, heads=heads, ffn_size=ctx.shape.ffn_size, policy=ctx.space.policy, kind="encoder"
    ).model
