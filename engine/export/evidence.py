"""The part of a model card that says how the model compares: verdict, and a table of all models with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def evidence_section(evidence: Mapping[str, Any]) -> str:
    """Markdown of the evidence.

    Args:
        evidence: `verdict`, a sentence; `advice`, lines; `split`; `rows` of it; `confidence`, a share; `models`, each
            with `title`, `metric` {name, value, low, high}, `difference` {value, low, high} or None, and `params`
            {encoder, total} or None.
    """
    models = evidence["models"]
    name = models[0]["metric"]["name"]
    lines = [
        "## How it compares",
        "",
        _plain(evidence["verdict"]),
        *(f"- {_plain(line)}" for line in evidence.get("advice", ())),
        "",
        f"| model | {_plain(name)} | found minus it | encoder parameters | all parameters |",
        "|---|---|---|---|---|",
        *(_line(model) for model in models),
        "",
        f"In brackets: {evidence['confidence']:.0%} intervals of a bootstrap over the {evidence['rows']:,} rows of"
        f" {evidence['split']}; differences are paired.",
    ]
    if evidence.get("advice"):
        lines.insert(3, "")
    return "\n".join(lines)


def _line(model: Mapping[str, Any]) -> str:
    score, gap, params = model["metric"], model["difference"], model["params"]
    own = f"{score['value']:.4f} ({score['low']:.4f} to {score['high']:.4f})"
    minus = "–" if gap is None else f"{gap['value']:+.4f} ({gap['low']:+.4f} to {gap['high']:+.4f})"
    counts = "– | –" if params is None else f"{params['encoder']:,} | {params['total']:,}"
    return f"| {_plain(model['title'])} | {own} | {minus} | {counts} |"


def _plain(text: Any) -> str:
    return " ".join(str(text).replace("|", "\\|").split())
