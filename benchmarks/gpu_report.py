"""Markdown of a GPU result: tables for its file, and a short one between two marks in README."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.compare import geometric_mean
from benchmarks.gpu_cases import BASELINES, OURS

Row = dict[str, object]
BEGIN, END = "<!-- gpu table: python -m benchmarks.gpu --readme FILE -->", "<!-- end of gpu table -->"


def markdown(result: dict[str, object]) -> str:
    """Geometric means per dtype and direction, every case, every losing case, and the other checks."""
    rows: list[Row] = result["ffn"]  # type: ignore[assignment]
    lines = [conditions(result), "", *summaries(rows), *checks(result), *every_case(rows)]
    lines += ["Cases in which ours is slower than eager or torch.compile:", *(losing(rows) or ["- none"]), ""]
    reasons = sorted({f"- {k}: {v}" for r in rows for k, v in r["refused"].items()})  # type: ignore[attr-defined]
    return "\n".join([*lines, "Sides that could not run:", *(reasons or ["- none"])]) + "\n"


def conditions(result: dict[str, object]) -> str:
    environment: dict[str, object] = result["environment"]  # type: ignore[assignment]
    text = "Conditions: " + ", ".join(f"{k} {v}" for k, v in environment.items()) + "; CUDA-graph replay on all sides."
    left = result.get("left_out")
    return text + (f" {left} cases were left out: the time was up." if left else "")


def summaries(rows: Sequence[Row]) -> list[str]:
    lines = []
    for dtype, backward in dict.fromkeys((r["dtype"], r["backward"]) for r in rows):
        members = [r for r in rows if (r["dtype"], r["backward"]) == (dtype, backward)]
        direction = "forward + backward" if backward else "forward"
        title = f"{dtype}, {direction}, {members[0]['tokens']} tokens, H = {members[0]['hidden']}"
        lines += [f"{title}: other side's time / ours (geometric mean, smallest)", ""]
        lines += ["| ours | " + " | ".join((*BASELINES, "floor")) + " |", "|---" * (len(BASELINES) + 2) + "|"]
        for own in OURS:
            cells = [_cell(members, side, own) for side in (*BASELINES, "floor")]
            lines.append(f"| {own} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def _cell(rows: Sequence[Row], side: str, own: str) -> str:
    values = [r["seconds"][side] / r["seconds"][own] for r in rows if {side, own} <= set(r["seconds"])]  # type: ignore[index, call-overload]
    return f"{geometric_mean(values):.2f} ({min(values):.2f})" if values else "-"


def every_case(rows: Sequence[Row]) -> list[str]:
    names = (*BASELINES, *OURS, "floor")
    lines = ["Microseconds of every case:", "", "| case | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        seconds: dict[str, float] = row["seconds"]  # type: ignore[assignment]
        cells = [f"{seconds[name] * 1e6:.1f}" if name in seconds else "-" for name in names]
        lines.append(f"| {_name(row)} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _name(row: Row) -> str:
    return f"{row['dtype']} {'fwd+bwd' if row['backward'] else 'fwd'} d={row['inner']} {row['expression']}"


def losing(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        seconds: dict[str, float] = row["seconds"]  # type: ignore[assignment]
        for own in OURS:
            for side in BASELINES:
                if own in seconds and side in seconds and seconds[own] > seconds[side]:
                    lines.append(f"- {own} {seconds[side] / seconds[own]:.2f} of {side}: {_name(row)}")
    return lines


def checks(result: dict[str, object]) -> list[str]:
    """Lines about grouped launches, never-seen expressions, repeated bits and agreement, where measured."""
    lines = []
    group: dict[str, object] | None = result.get("grouped")  # type: ignore[assignment]
    for direction in ("forward", "forward + backward") if group else ():
        assert group is not None
        seconds: dict[str, float] = group[direction]["seconds"]  # type: ignore[index, call-overload]
        one = seconds.get("one launch")
        others = [f"{k} {v / one:.2f}" if one else k for k, v in seconds.items() if k != "one launch"]
        what = f"{group['members']} mixed stacks, {group['tokens']} tokens each, {direction}"
        lines.append(f"- {what}: time / that of one grouped call ({(one or 0) * 1e6:.0f} us): " + ", ".join(others))
        refused: dict[str, str] = group[direction]["refused"]  # type: ignore[index, call-overload]
        lines += [f"- could not run: {name}: {why}" for name, why in refused.items()]
    unseen: dict[str, float] | None = result.get("never_seen")  # type: ignore[assignment]
    if unseen:
        lines.append(
            f"- first result of {unseen['expressions']} never-seen expressions: median {unseen['median_ms']:.2f} ms,"
            f" 95 % {unseen['p95_ms']:.2f} ms, worst {unseen['worst_ms']:.2f} ms; {unseen['compilations']} compilations"
        )
    for key, text in (("repeated", "forward and backward, twice"), ("agreement", "largest difference from eager")):
        values: dict[str, object] = result.get(key) or {}  # type: ignore[assignment]
        lines += [f"- {text}: {name}: {v if isinstance(v, str) else format(v, '.1e')}" for name, v in values.items()]
    problems: dict[str, str] = result.get("problems") or {}  # type: ignore[assignment]
    lines += [f"- {name} could not be measured: {why}" for name, why in problems.items()]
    return ["Other checks:", *lines, ""] if lines else []


def into_readme(result: dict[str, object], readme: Path) -> None:
    """Replaces what stands between the marks of README by the result's conditions and summaries.

    Raises:
        ValueError: README has no marks, or the result is a rehearsal.
    """
    environment: dict[str, object] = result["environment"]  # type: ignore[assignment]
    if "STUB" in str(environment["device"]):
        raise ValueError(f"--readme: the result is of {environment['device']!r}: only measurements go into README")
    text = readme.read_text(encoding="utf-8")
    found = re.search(re.escape(BEGIN) + r".*?" + re.escape(END), text, re.S)
    if found is None:
        raise ValueError(f"--readme: {readme} has no line {BEGIN}")
    rows: list[Row] = result["ffn"]  # type: ignore[assignment]
    table = "\n".join([BEGIN, conditions(result), "", *summaries(rows), *checks(result)]).rstrip()
    readme.write_text(text[: found.start()] + f"{table}\n{END}" + text[found.end() :], encoding="utf-8")
