"""The model card of an exported directory: README.md, Markdown with a YAML head as the Hugging Face hub reads it.

What the model is and whether it is worth using comes first, how it was made last. Everything that is not ours (labels,
texts, names) is escaped. What nobody knows is left out: a license above all, which the teacher and the data decide.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from engine.architecture.params import count_parameters, layer_parameters
from engine.architecture.shape import inner_width
from engine.export.answers import answers_section
from engine.export.evidence import evidence_section, speed_section
from engine.export.markdown import code, plain, table
from engine.export.usage import usage_section
from engine.student.configuration import FFNASConfig
from engine.student.modeling import FFNASPreTrainedModel

HUB_METRICS = {"mcc": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr"}
"""What the hub calls metrics it knows under another name."""

_KNOWN = {
    *("name", "about", "task", "teacher", "license", "language", "base_model", "dataset", "metric", "metrics"),
    *("evidence", "trained_on", "limits", "examples", "commands"),
}


def model_card(model: FFNASPreTrainedModel, card: Mapping[str, Any], *, drawing: str | None = None) -> str:
    """Text of the model card.

    Args:
        model: the exported model.
        card: all optional: `name`, the title; `about`, a sentence below it; `task`; `teacher`; `license` (SPDX id);
            `language` (ISO 639-1); `base_model` (hub name); `dataset` {"name", "hub": hub name or None}; `metric`
            {"name", "value", "split"}; `metrics` {name: value}; `evidence`, see `engine.export.evidence`, its
            `answers` see `engine.export.answers`; `trained_on` and `limits`, lines; `examples`, texts of one input for
            the snippets; `commands` {what for: command}; any other entry is listed under "How it was found".
        drawing: file name of the architecture's picture beside it.
    """
    task = model.hand_over.tag
    facts = {key: card[key] for key in ("task", "teacher") if card.get(key)}
    facts |= {key: value for key, value in card.items() if key not in _KNOWN}
    evidence = card.get("evidence")
    split = evidence["split"] if evidence else ""
    parts = [
        f"---\n{yaml.safe_dump(_head(task, card), sort_keys=False, allow_unicode=True)}---",
        f"# {plain(card.get('name') or 'FFNAS model')}",
        plain(card.get("about") or "A BERT-like encoder whose feed-forward networks were found by ffnas."),
        evidence_section(evidence) if evidence else "",
        _scores(card),
        speed_section(evidence) if evidence else "",
        usage_section(model.hand_over, card.get("examples", ())),
        _listed("What it was trained on", card.get("trained_on", ())),
        answers_section(evidence["answers"], split) if evidence and evidence.get("answers") else "",
        _listed("Limits", card.get("limits", ())),
        _architecture_section(model, drawing),
        _listed("How it was found", [f"{key}: {_value(value)}" for key, value in facts.items()]),
        *(f"{plain(key)}:\n\n{code(command)}" for key, command in card.get("commands", {}).items()),
    ]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def _head(task: str, card: Mapping[str, Any]) -> dict[str, Any]:
    """The YAML head."""
    head: dict[str, Any] = {}
    for name in ("language", "license"):
        if card.get(name):
            head[name] = card[name]
    head |= {
        "library_name": "transformers",
        "pipeline_tag": task,
        "tags": ["ffnas", "neural-architecture-search", "knowledge-distillation"],
    }
    if card.get("base_model"):
        head["base_model"] = card["base_model"]
    data, metric = card.get("dataset"), card.get("metric")
    if data and data.get("hub"):
        head["datasets"] = [data["hub"]]
    if metric:
        head["metrics"] = [HUB_METRICS.get(metric["name"], metric["name"])]
    if metric and data:
        head["model-index"] = [{"name": str(card.get("name") or "FFNAS model"), "results": [_result(task, card)]}]
    return head


def _result(task: str, card: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of the model index: all metrics on the reported split, the primary one first."""
    data, metric = card["dataset"], card["metric"]
    values = {metric["name"]: metric["value"], **card.get("metrics", {})}
    return {
        "task": {"type": task, "name": task.replace("-", " ").capitalize()},
        "dataset": {
            "type": data.get("hub") or re.sub(r"[^A-Za-z0-9._-]+", "-", data["name"]).strip("-") or "data",
            "name": data["name"],
            "split": metric["split"],
        },
        "metrics": [
            {"type": HUB_METRICS.get(name, name), "value": float(value), "name": name} for name, value in values.items()
        ],
    }


def _listed(title: str, lines: Any) -> str:
    return "\n".join([f"## {title}", "", *(f"- {line}" for line in map(plain, lines))]) if lines else ""


def _scores(card: Mapping[str, Any]) -> str:
    """All metrics; beside evidence, which has the primary one, the others."""
    metric = card.get("metric")
    split = metric.get("split", "") if metric else ""
    values = {metric["name"]: metric["value"]} if metric else {}
    values |= {name: value for name, value in card.get("metrics", {}).items() if name not in values}
    if card.get("evidence"):
        rest = [f"{plain(name)} {value:.4f}" for name, value in values.items() if not metric or name != metric["name"]]
        return f"Other scores on {plain(split)}: {', '.join(rest)}." if rest else ""
    if not values:
        return ""
    rows = [[plain(name), f"{value:.4f}", plain(split)] for name, value in values.items()]
    return "\n".join(["## Scores", "", *table(["metric", "value", "split"], rows)])


def _architecture_section(model: FFNASPreTrainedModel, drawing: str | None) -> str:
    config = model.config
    architecture = config.full_architecture
    pruned = any(layer.heads is not None for layer in architecture.layers)
    rows = []
    for index, layer in enumerate(architecture.layers):
        heads = config.num_attention_heads if layer.heads is None else layer.heads
        first = [str(index), str(heads)] if pruned else [str(index)]
        if layer.stack == 0:
            rows.append([*first, "none", "0", "", "", "0"])
            continue
        inner, params = inner_width(layer.ratio, config.intermediate_size), layer_parameters(layer, config.shape)
        rows.append([*first, f"`{layer.expression}`", str(layer.stack), str(layer.ratio), str(inner), f"{params:,}"])
    head = ["layer", *(["heads"] if pruned else []), "expression", "stack", "ratio", "inner width", "FFN parameters"]
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
            *table(head, rows),
            "",
            "Expression: what each FFN computes. Stack: FFNs after one attention block. Ratio: their inner width, as a"
            " share of the widest.",
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


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(inner) for inner in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
