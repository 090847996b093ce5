"""The parts of a model card that say how the model compares: verdict, scores with intervals, size and speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.export.markdown import plain, table

_TITLES = {"found": "**this model**"}
"""What a card calls a model of the evidence, by kind, where the evidence calls it otherwise."""


def evidence_section(evidence: Mapping[str, Any]) -> str:
    """Markdown of the evidence.

    Args:
        evidence: `verdict`, a sentence; `advice`, lines; `split`; `rows` of it; `confidence`, a share; `models`, each
            with `title`, `metric` {name, value, low, high}, `difference` {value, low, high} or None, `params` {encoder,
            total} or None, and, all optional, `kind`, `bytes` and `speed` [{side, batch, length, milliseconds}];
            `speed` {processor, threads, device, precision} or None: how it was measured.
    """
    models = evidence["models"]
    name = models[0]["metric"]["name"]
    head = ["model", plain(name), "this model minus it", "parameters of its layers", "all parameters"]
    advice = [f"- {plain(line)}" for line in evidence.get("advice", ())]
    return "\n".join(
        [
            "## How it compares",
            "",
            plain(evidence["verdict"]),
            *(["", *advice] if advice else []),
            "",
            *table(head, [_scores(model) for model in models]),
            "",
            f"In brackets: {evidence['confidence']:.0%} intervals of a bootstrap over the {evidence['rows']:,} rows of"
            f" {plain(evidence['split'])}; differences are paired. A difference whose interval holds 0 may be chance.",
            "",
            *_speed(evidence),
        ]
    )


def _scores(model: Mapping[str, Any]) -> list[str]:
    score, gap, params = model["metric"], model["difference"], model["params"]
    own = f"{score['value']:.4f} ({score['low']:.4f} to {score['high']:.4f})"
    minus = "–" if gap is None else f"{gap['value']:+.4f} ({gap['low']:+.4f} to {gap['high']:+.4f})"
    counts = ["–", "–"] if params is None else [f"{params['encoder']:,}", f"{params['total']:,}"]
    return [_title(model), own, minus, *counts]


def _title(model: Mapping[str, Any]) -> str:
    return _TITLES.get(model.get("kind", ""), plain(model["title"]))


def _speed(evidence: Mapping[str, Any]) -> Sequence[str]:
    """Milliseconds of the models that were timed, and how much less than its teacher's this model's are."""
    timed = [model for model in evidence["models"] if model.get("speed")]
    if not timed:
        return []
    sides = sorted({(entry["batch"], entry["side"]) for model in timed for entry in model["speed"]})
    rows = []
    for model in timed:
        took = {(entry["batch"], entry["side"]): entry["milliseconds"] for entry in model["speed"]}
        rows.append([_title(model), *(f"{took[side]:.3g}" if side in took else "–" for side in sides)])
    length = timed[0]["speed"][0]["length"]
    head = ["ms", *(f"{_texts(batch)}, {_SIDES.get(side, plain(side))}" for batch, side in sides)]
    size = next((model["bytes"] for model in timed if model.get("kind") == "found" and model.get("bytes")), None)
    return [
        "## Size and speed",
        "",
        *([f"{size / 1e6:.3g} MB on disk."] if size else []),
        f"Milliseconds of one pass over so many texts of {length} tokens: {_conditions(evidence)}.",
        "",
        *table(head, rows),
    ]


_SIDES = {"eager": "plain PyTorch", "kernels": "ffnas' kernels"}


def _texts(batch: int) -> str:
    return "1 text" if batch == 1 else f"{batch} texts"


def _conditions(evidence: Mapping[str, Any]) -> str:
    at = evidence.get("speed") or {}
    threads = at.get("threads", "?")
    parts = [at.get("processor") or at.get("device", "cpu"), f"{threads} thread{'' if threads == 1 else 's'}"]
    return plain(", ".join([*parts, at.get("precision", "fp32"), "medians"]))
