"""`ffnas teacher`: fine-tune a teacher on a task, or find it in the cache, and say where it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.data.task_data import TaskData
    from search.config.schema import SearchConfig
    from search.console.progress import Reporter


def command(argv: list[str]) -> None:
    """Runs stage 0 of a search alone, with the options of `ffnas search`."""
    from search.config.help import asked_for_help, teacher_help
    from search.config.inputs import read_inputs
    from search.config.options import parse
    from search.console.progress import Reporter

    if asked_for_help(argv):
        print(teacher_help(argv))
        return
    with Reporter() as reporter:
        config, _ = parse(argv, prog="ffnas teacher")
        reporter.doing("reading the data")
        task = read_inputs(config)  # mistakes in files are told before frameworks are loaded
        reporter.doing("loading PyTorch")
        _teach(config, task, reporter)


def _teach(config: SearchConfig, task: TaskData, reporter: Reporter) -> None:
    from engine.evaluation.evaluation import evaluate_dev
    from engine.evaluation.metrics import primary
    from search.console.libraries import quiet
    from search.context import prepare
    from search.multitask import teach_others
    from search.pipeline import teach

    quiet()
    prepared = prepare(config, reporter, task=task)
    teacher = teach(prepared, reporter)
    metrics = evaluate_dev(teacher.model, prepared.data, precision=prepared.config.teacher_precision)
    name, value = primary(prepared.spec, metrics)
    reporter.info(f"teacher: {teacher.folder} ({name} {value:.4f} on dev)")
    for other_name, other in teach_others(prepared, reporter).items():
        data = prepared.others[other_name]
        name, value = primary(data.spec, evaluate_dev(other.model, data, precision=prepared.config.teacher_precision))
        reporter.info(f"teacher of {other_name}: {other.folder} ({name} {value:.4f} on dev)")
