"""What the model card of a run says, and the architecture's drawing in it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.architecture.params import count_parameters
from engine.data.task_data import TaskData
from engine.evaluation.metrics import primary
from engine.model_sources import hub_name
from search.evidence.speed import parameters
from search.report.drawing import draw_architecture
from search.report.theme import style
from search.report.titles import task_name, teacher_name, title_of

if TYPE_CHECKING:
    from engine.student.configuration import FFNASConfig
    from search.context import Prepared
    from search.derive import Derived


def card_facts(ctx: Prepared, best: Derived, found: dict[str, Any]) -> dict[str, Any]:
    """Entries of the model card (`engine.export.card.model_card`) but the evidence; `found` is told as it is."""
    config, spec = ctx.config, ctx.spec
    name, value = primary(spec, best.dev)
    english = config.data.task is not None or config.data.train is None
    return {
        "name": title_of(ctx, best.model),
        "about": about(ctx, best),
        "task": f"{task_name(config, spec)} ({spec.kind.replace('_', ' ')})",
        "teacher": hub_name(config.teacher) or teacher_name(config.teacher),
        "base_model": hub_name(config.teacher),
        **({"language": "en"} if english else {}),
        "dataset": {"name": task_name(config, spec), "hub": dataset_hub_name(ctx.task)},
        "metric": {"name": name, "value": value, "split": "dev"},
        "metrics": best.dev,
        "trained_on": trained_on(ctx.task, task_name(config, spec)),
        "limits": limits(ctx, english),
        "examples": _EXAMPLES[: len(spec.text_columns)],
        **found,
        "seed": config.seed,
    }


_EXAMPLES = ("The first text.", "The second text.")


def about(ctx: Prepared, best: Derived) -> str:
    """One sentence: what it is made of, what for, and how much smaller."""
    spec, teacher = ctx.spec, teacher_name(ctx.config.teacher)
    own, whole = parameters(best.model), parameters(ctx.teacher.model)
    task = f"{spec.kind.replace('_', ' ')} of {'pairs of texts' if spec.is_pair else 'texts'}"
    sizes = (
        f"It has {_percent(own['encoder'] / whole['encoder'])} of the parameters of {teacher}'s layers and"
        f" {_percent(own['total'] / whole['total'])} of all its parameters, embeddings included."
    )
    if ctx.config.strategy == "inherit":
        layers = best.model.config.num_hidden_layers
        made = (
            f"A smaller {teacher} for {task}: {layers} of its {ctx.teacher.num_layers} layers, with the attention heads"
            " and neurons that matter most, chosen by ffnas and then trained to answer as it does."
        )
    else:
        made = (
            f"A BERT-like encoder for {task}, whose feed-forward networks were found by ffnas and which was trained to"
            f" answer as {teacher} does."
        )
    return f"{made} {sizes}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def dataset_hub_name(task: TaskData) -> str | None:
    """The hub's name of the data, None where they are files."""
    sources = [file.source for file in task.understood.files if file.role == "train"]
    name = sources[0].partition("@")[0].partition(":")[0] if sources else ""
    is_hub = name.count("/") == 1 and " " not in name and not Path(sources[0]).exists() and not Path(name).suffix
    return name if is_hub else None


def trained_on(task: TaskData, name: str) -> list[str]:
    """Rows, columns and classes, one line each; of files the names alone, not where they lie."""
    spec = task.spec
    lines = []
    for file in task.understood.files:
        source = Path(file.source).name if Path(file.source).exists() else file.source
        lines.append(f"{file.role}: {source}, {file.rows:,} rows read")
    if not any(file.role == "dev" for file in task.understood.files):
        lines.append("dev: rows held out of the same source")
    lines.append(
        f"{name}: {len(task.train):,} rows to learn from, {len(task.score):,} to compare candidates,"
        f" {len(task.select):,} to choose checkpoints, {len(task.dev):,} (dev) for the scores on this page alone"
    )
    lines.append(f"columns read: {', '.join(spec.text_columns)} (text), {spec.label_column} (label)")
    labels = task.train.labels
    if labels is None:
        return lines
    return [*lines, *spec.head.card_lines(spec, labels)]


def limits(ctx: Prepared, english: bool) -> list[str]:
    """What nobody has checked."""
    task, config = ctx.task, ctx.config
    kind = "English texts like those above" if english else "the language and the kind of text it was trained on"
    return [
        f"Measured on {kind}, {len(task.dev):,} rows: nothing is known about other languages, subjects and sources.",
        f"Texts were cut at {config.data.max_length} tokens: what is behind them it has never seen.",
        f"One search with one seed ({config.seed}): another may end a little better or worse.",
        "Not evaluated for fairness, nor for texts written to mislead it; what its teacher and the labels get wrong, it"
        " has learned.",
        "No license is stated, since the teacher's and the data's decide: put a license into the head of this file"
        " before you publish the model.",
    ]


def architecture_png(
    config: FFNASConfig,
    *,
    teacher: str | None = None,
    teacher_layers: int | None = None,
    layer_map: Sequence[int] | None = None,
) -> bytes:
    """PNG of the architecture `config` stores; beside its teacher where that is given (see `draw_architecture`)."""
    architecture = config.full_architecture
    with style():
        made = draw_architecture(
            architecture,
            hidden_size=config.hidden_size,
            params=count_parameters(architecture, config.shape, fit_dense=False),
            teacher=teacher,
            teacher_layers=teacher_layers,
            layer_map=layer_map,
        )
        buffer = io.BytesIO()
        made.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
