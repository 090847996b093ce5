"""Exports a found model as an ordinary Hugging Face directory.

    model.safetensors config.json      weights of the subnet alone, without `fit_dense`; labels in the config
    modeling_ffnas.py, ...             the model in plain PyTorch, for `trust_remote_code=True` (`engine.handover`)
    tokenizer files                    its length limit lowered to the model's positions
    README.md, architecture.png        model card: drawing, layers, sizes, scores, how it was found, how to load it
    architecture.json                  the architecture file, if asked for

The directory appears whole or not at all, and loads with ffnas installed and without. Rejected: writing the supernet
with an architecture beside it. The files would be several times larger, and every reader would have to slice them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from engine.architecture.architecture import Architecture
from engine.architecture.file import save_architecture
from engine.architecture.params import count_parameters, layer_parameters
from engine.architecture.shape import inner_width
from engine.export.evidence import evidence_section
from engine.files import atomic_directory, write_text_atomic
from engine.handover import AUTO_CLASSES, auto_map
from engine.student.configuration import FFNASConfig
from engine.student.modeling import FFNASPreTrainedModel
from engine.student.supernet import extract

_TASKS = {
    "FFNASForSequenceClassification": "text-classification",
    "FFNASForQuestionAnswering": "question-answering",
    "FFNASForMultipleChoice": "multiple-choice",
    "FFNASForMaskedLM": "fill-mask",
    "FFNASModel": "feature-extraction",
}
"""Per class the hub's task tag."""

_PIPELINES = {"text-classification", "fill-mask", "feature-extraction", "question-answering"}
"""Tasks with a pipeline: transformers' own, or for question answering, which 5.x no longer has, the directory's."""

DRAWING = "architecture.png"


def export_model(
    model: FFNASPreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out_dir: str | os.PathLike[str],
    architecture: Architecture | None,
    card: Mapping[str, Any],
    *,
    architecture_file: bool = False,
    fit_dense: bool = False,
    drawing: bytes | None = None,
) -> None:
    """Writes `architecture` of `model` to the directory `out_dir`, replacing it if it exists.

    Args:
        model: a student or supernet; not changed.
        tokenizer: saved beside the model; None writes none.
        out_dir: the directory.
        architecture: the subnet to write, None for everything stored.
        card: for the model card, all optional: `name`; `task`; `teacher`; `license` (SPDX id); `metric`
            {"name", "value", "split"}; `metrics` {name: value}; `evidence`, see `engine.export.evidence`; any other
            entry is listed under "How it was found".
        architecture_file: also write `architecture.json`.
        fit_dense: keep the distillation projection.
        drawing: PNG of the architecture for the model card.

    Raises:
        UserError: `model` does not store the architecture, or it cannot be written as plain PyTorch code.
        OSError: the directory cannot be written.
    """
    exported = extract(model, architecture, fit_dense=fit_dense).eval()
    exported.config.auto_map = auto_map()  # what it names is written with the configuration
    with atomic_directory(out_dir) as folder:
        exported.save_pretrained(folder)
        if tokenizer is not None:
            _limited(tokenizer, exported.config).save_pretrained(folder)
        if drawing is not None:
            (folder / DRAWING).write_bytes(drawing)
        text = model_card(exported, card, drawing=None if drawing is None else DRAWING)
        (folder / "README.md").write_text(text, encoding="utf-8")
        if architecture_file:
            config = exported.config
            save_architecture(config.full_architecture, folder / "architecture.json", config.shape)


def rewrite_card(model: FFNASPreTrainedModel, out_dir: str | os.PathLike[str], card: Mapping[str, Any]) -> None:
    """Writes the model card of a directory that `export_model` wrote for all of `model` again; `card` as there.

    Raises:
        OSError: the directory cannot be written.
    """
    folder = Path(out_dir)
    drawing = DRAWING if (folder / DRAWING).is_file() else None
    write_text_atomic(folder / "README.md", model_card(extract(model, None), card, drawing=drawing))


def model_card(model: FFNASPreTrainedModel, card: Mapping[str, Any], *, drawing: str | None = None) -> str:
    """Text of the model card (Markdown with a YAML head); `card` as in `export_model`, `drawing` a file beside it."""
    name = type(model).__name__
    task, auto_class = _TASKS[name], AUTO_CLASSES[name]
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": task,
        "tags": ["ffnas", "neural-architecture-search"],
    }
    if card.get("license"):
        head["license"] = card["license"]
    known = {"name", "task", "teacher", "license", "metric", "metrics", "evidence"}
    facts = {key: card[key] for key in ("task", "teacher") if card.get(key)}
    facts |= {key: value for key, value in card.items() if key not in known}
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {card.get('name') or 'FFNAS model'}",
        "A BERT-like encoder whose feed-forward networks were found by ffnas.",
        _scores(card),
        evidence_section(card["evidence"]) if card.get("evidence") else "",
        _architecture_section(model, drawing),
        "## How it was found\n\n" + "\n".join(f"- {key}: {_plain(value)}" for key, value in facts.items())
        if facts
        else "",
        _usage(task, auto_class),
    ]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def _scores(card: Mapping[str, Any]) -> str:
    rows = []
    metric = card.get("metric")
    if metric:
        rows.append((metric["name"], metric["value"], metric.get("split", "")))
    split = metric.get("split", "") if metric else ""
    rows += [(k, v, split) for k, v in card.get("metrics", {}).items() if not metric or k != metric["name"]]
    if not rows:
        return ""
    lines = [f"| {name} | {value:.4f} | {where} |" for name, value, where in rows]
    return "\n".join(["## Scores", "", "| metric | value | split |", "|---|---|---|", *lines])


def _architecture_section(model: FFNASPreTrainedModel, drawing: str | None) -> str:
    config = model.config
    architecture = config.full_architecture
    pruned = any(layer.heads is not None for layer in architecture.layers)
    lines = []
    for index, layer in enumerate(architecture.layers):
        heads = config.num_attention_heads if layer.heads is None else layer.heads
        first = f"| {index} | {heads} |" if pruned else f"| {index} |"
        if layer.stack == 0:
            lines.append(f"{first} none | 0 | | | 0 |")
            continue
        inner = inner_width(layer.ratio, config.intermediate_size)
        params = layer_parameters(layer, config.shape)
        lines.append(f"{first} `{layer.expression}` | {layer.stack} | {layer.ratio} | {inner} | {params:,} |")
    encoder = count_parameters(architecture, config.shape, fit_dense=False)
    return "\n".join(
        [
            "## Architecture",
            "",
            *([f"![The layers, input at the bottom]({drawing})", ""] if drawing else []),
            f"Hidden size {config.hidden_size}, {config.num_hidden_layers} layers, {config.num_attention_heads} heads,"
            f" {config.embedding_type} embedding, width policy {config.width_policy}.",
            *_sources(config),
            f"{encoder:,} parameters in embeddings and encoder, {model.num_parameters():,} with pooler and head.",
            "",
            f"| layer |{' heads |' if pruned else ''} expression | stack | ratio | inner width | FFN parameters |",
            f"|---|{'---|' if pruned else ''}---|---|---|---|---|",
            *lines,
            "",
            "Published form:",
            "",
            "```",
            str(architecture),
            "```",
        ]
    )


def _sources(config: FFNASConfig) -> list[str]:
    if not config.source_layers:
        return []
    return [f"Its layers are layers {', '.join(map(str, config.source_layers))} of the model they were taken from."]


def _usage(task: str, auto_class: str) -> str:
    runnable = task in _PIPELINES
    lines = [
        "## Use",
        "",
        "With torch and transformers alone (runs the Python files of this folder):",
        "",
        "```python",
        f"from transformers import {auto_class}, AutoTokenizer{', pipeline' if runnable else ''}",
        "",
        f'model = {auto_class}.from_pretrained("path/to/this/folder", trust_remote_code=True)',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder", trust_remote_code=True)',
    ]
    if runnable:
        lines.append(f'run = pipeline("{task}", model="path/to/this/folder", trust_remote_code=True)')
    return "\n".join(
        [
            *lines,
            "```",
            "",
            "With ffnas installed, on its fused kernels: put `import engine` first and leave out `trust_remote_code`.",
        ]
    )


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(inner) for inner in value)
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())


def _limited(tokenizer: PreTrainedTokenizerBase, config: FFNASConfig) -> PreTrainedTokenizerBase:
    """The tokenizer with a length limit the model can take, so that truncation in pipelines works."""
    if tokenizer.model_max_length <= config.max_position_embeddings:
        return tokenizer
    limited = copy.deepcopy(tokenizer)
    limited.model_max_length = config.max_position_embeddings
    return limited
