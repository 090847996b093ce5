"""The parts of a model card that say how the model compares: verdict, scores with intervals, size and speed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from engine.export.markdown import plain, table

_MEANINGS = {
    "uniform": "Uniform student: made of the same teacher by hand, all layers alike.",
    "random": "Random: the best of those drawn at random from what the search chooses from.",
    "gelu": "Hand-designed student: the usual feed-forward networks, the same number of parameters.",
    "bag_of_words": "Bag of words: counts of words and word pairs with a linear model, trained in seconds.",
    "majority": "A constant answer: what is most frequent in the training rows, whatever the text.",
}
"""What the models a newcomer does not know are, by name."""

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
            plain(re.sub(r"^found:", "This model:", evidence["verdict"])),
            *(["", *advice] if advice else []),
            "",
            *table(head, [_scores(model) for model in models]),
            "",
            f"In brackets: {evidence['confidence']:.0%} intervals of a bootstrap over the {evidence['rows']:,} rows of"
            f" {plain(evidence['split'])}; differences are paired. A difference whose interval holds 0 may be chance.",
            "",
            *(f"- {_MEANINGS[model['name']]}" for model in models if model.get("name") in _MEANINGS),
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


def speed_section(evidence: Mapping[str, Any]) -> str:
    """Markdown with the milliseconds of model and teacher, "" where they were not timed; `evidence` as above."""
    timed = [m for m in evidence["models"] if m.get("speed") and m.get("kind") in ("found", "teacher")]
    if not timed:
        return ""
    sides = sorted({(entry["batch"], entry["side"]) for model in timed for entry in model["speed"]})
    took = [{(entry["batch"], entry["side"]): entry["milliseconds"] for entry in model["speed"]} for model in timed]
    rows = [
        [_title(model), *(_milliseconds(times[side]) if side in times else "–" for side in sides)]
        for model, times in zip(timed, took, strict=True)
    ]
    if len(timed) == 2:
        factors = (took[1][s] / took[0][s] if s in took[0] and s in took[1] else None for s in sides)
        rows.append(["times as fast", *("–" if factor is None else f"{factor:.1f}" for factor in factors)])
    length = timed[0]["speed"][0]["length"]
    head = ["ms", *(f"{_texts(batch)}, {_SIDES.get(side, plain(side))}" for batch, side in sides)]
    size = next((model["bytes"] for model in timed if model.get("kind") == "found" and model.get("bytes")), None)
    return "\n".join(
        [
            "## Size and speed",
            "",
            *([f"{size / 1e6:.3g} MB on disk."] if size else []),
            f"Milliseconds of one pass over so many texts of {length} tokens: {_conditions(evidence)}.",
            "",
            *table(head, rows),
        ]
    )


def _milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


_SIDES = {"eager": "plain PyTorch", "kernels": "ffnas' kernels"}


def _texts(batch: int) -> str:
    return "1 text" if batch == 1 else f"{batch} texts"


def _conditions(evidence: Mapping[str, Any]) -> str:
    at = evidence.get("speed") or {}
    threads = at.get("threads", "?")
    parts = [at.get("processor") or at.get("device", "cpu"), f"{threads} thread{'' if threads == 1 else 's'}"]
    return plain(", ".join([*parts, at.get("precision", "fp32"), "medians"]))
