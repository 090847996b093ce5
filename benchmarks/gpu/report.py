"""Markdown of GPU results: everything for their folder, and a short table between two marks in README."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.compare import geometric_mean
from benchmarks.gpu.records import Line, ended
from benchmarks.gpu.sides import BASELINES, OURS

BEGIN, END = "<!-- gpu table: python -m benchmarks.gpu --readme FOLDER -->", "<!-- end of gpu table -->"


def markdown(lines: Sequence[Line]) -> str:
    """Conditions, ratios, every case and every losing one, the other families, and what could not run."""
    rows = table(lines)
    parts = [conditions(lines), "", *verdicts(lines), "", *summaries(rows), *every_case(rows, "seconds")]
    parts += [*every_case(rows, "ungraphed"), *kernel_times(lines), *others(lines)]
    parts += ["Cases in which ours is slower than eager or torch.compile:", *(losing(rows) or ["- none"]), ""]
    return "\n".join([*parts, "What could not run:", *(refusals(lines) or ["- none"])]) + "\n"


def table(lines: Sequence[Line]) -> list[Line]:
    """The cases of the FFN table."""
    return [line for line in ended(lines, "ffn") if line["state"] == "done"]


def conditions(lines: Sequence[Line]) -> str:
    found = next((line for line in ended(lines, "machine") if line["case"] == "environment"), {})
    own = {k: v for k, v in found.items() if k not in ("family", "case", "state", "lost")}
    return "Conditions: " + ", ".join(f"{k} {v}" for k, v in own.items()) + "; CUDA-graph replay unless it says so."


def verdicts(lines: Sequence[Line]) -> list[str]:
    """Tests, accuracy and repeated bits, a line each, and every failure."""
    found = []
    tests = [line for line in lines if str(line.get("family", "")).startswith("tests ") and "case" in line]
    ends = {line["case"]: line for line in tests if line["state"] != "began"}
    counts = Counter(line["state"] for line in ends.values())
    if ends:
        found.append("- tests: " + ", ".join(f"{n} {state}" for state, n in sorted(counts.items())))
    found += [
        f"- test {line['state']}: {name}: {line.get('reason', '')}"
        for name, line in ends.items()
        if line["state"] not in ("done", "skipped")
    ]
    skips = Counter(line.get("reason", "") for line in ends.values() if line["state"] == "skipped")
    found += [f"- {n} tests skipped: {why}" for why, n in skips.items()]
    checked = [line for line in ended(lines, "accuracy") if line["state"] == "done"]
    wrong = [
        f"- too large an error: {line['case']}, {side}: {', '.join(names)}"
        for line in checked
        for side, names in line["wrong"].items()
        if names
    ]
    if checked:
        sides = sum(len(line["wrong"]) for line in checked)
        found.append(f"- accuracy: {sides - len(wrong)} of {sides} results within the rule, of {len(checked)} cases")
    for line in ended(lines, "checks"):
        found += [f"- {line['case']}: {side}: {bits}" for side, bits in line.get("bits", {}).items()]
    return [*found, *wrong]


def _group(row: Line) -> tuple[object, ...]:
    dtype = f"{row['dtype']}/{row['autocast']}" if row.get("autocast") else row["dtype"]
    return dtype, row["backward"], row["tokens"], row["hidden"]


def summaries(rows: Sequence[Line]) -> list[str]:
    """Per dtype, direction and size: ratios of the sides."""
    lines = []
    for key in dict.fromkeys(map(_group, rows)):
        own_rows = [r for r in rows if _group(r) == key]
        direction = "forward + backward" if key[1] else "forward"
        size = f"{key[2]} tokens, H = {key[3]}"
        lines += [f"{key[0]}, {direction}, {size}: other side's time / ours (geometric mean, smallest)", ""]
        lines += ["| ours | " + " | ".join((*BASELINES, "floor")) + " |", "|---" * (len(BASELINES) + 2) + "|"]
        for own in OURS:
            cells = [_cell(own_rows, side, own) for side in (*BASELINES, "floor")]
            lines.append(f"| {own} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def _cell(rows: Sequence[Line], side: str, own: str) -> str:
    values = [r["seconds"][side] / r["seconds"][own] for r in rows if {side, own} <= set(r["seconds"])]
    return f"{geometric_mean(values):.2f} ({min(values):.2f})" if values else "-"


def every_case(rows: Sequence[Line], kind: str) -> list[str]:
    """Microseconds of all sides; `kind`: "seconds" (replayed) or "ungraphed"."""
    names = (*BASELINES, *OURS, *(["floor"] if kind == "seconds" else []))
    title = "Microseconds of every case" + (":" if kind == "seconds" else ", called without a graph:")
    lines = [title, "", "| case | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        seconds: dict[str, float] = row[kind]
        cells = [f"{seconds[name] * 1e6:.1f}" if name in seconds else "-" for name in names]
        lines.append(f"| {row['case']} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def kernel_times(lines: Sequence[Line]) -> list[str]:
    """Microseconds of every launch."""
    found = []
    for line in ended(lines, "kernels"):
        for direction in ("forward", "backward"):
            times = line.get(direction, [])
            if times:
                found.append(f"{line['case']}, {direction}: {sum(t for _, t in times):.1f} us")
                found += [f"- {t:.1f} {name}" for name, t in times]
    return ["Microseconds of single kernels:", *found, ""] if found else []


def others(lines: Sequence[Line]) -> list[str]:
    """Ceilings, grouped launches, never-seen expressions, and distillation steps."""
    found = []
    for line in ended(lines, "machine"):
        if "flops" in line:
            found.append(f"- {line['case']}: {line['flops'] / 1e12:.0f} TFLOP/s, {line['bandwidth'] / 1e12:.2f} TB/s")
        if "product" in line:
            found.append(f"- {line['case']}: product {line['product'] * 1e6:.1f} us, copy {line['copy'] * 1e6:.1f} us")
    done = {line["case"]: line for line in ended(lines, "checks") if line["state"] == "done"}
    group = done.get("grouped", {})
    for direction in ("forward", "forward + backward") if group else ():
        seconds: dict[str, float] = group[direction]["seconds"]
        one = seconds.get("one launch")
        rest = [f"{k} {v / one:.2f}" if one else k for k, v in seconds.items() if k != "one launch"]
        what = f"{group['members']} mixed stacks, {group['tokens']} tokens each, {direction}"
        found.append(f"- {what}: time / that of one grouped call ({(one or 0) * 1e6:.0f} us): " + ", ".join(rest))
    unseen = done.get("never seen")
    if unseen:
        found.append(
            f"- first result of {unseen['expressions']} never-seen expressions: median {unseen['median_ms']:.2f} ms,"
            f" 95 % {unseen['p95_ms']:.2f} ms, worst {unseen['worst_ms']:.2f} ms; {unseen['compilations']} compilations"
        )
    for line in ended(lines, "steps"):
        if line["state"] == "done":
            found.append(f"- step, {line['case']}: {line['seconds'] * 1e3:.2f} ms per candidate")
    return ["Other measurements:", *found, ""] if found else []


def losing(rows: Iterable[Line]) -> list[str]:
    found = []
    for row in rows:
        for kind in ("seconds", "ungraphed"):
            seconds: dict[str, float] = row[kind]
            pairs = [(own, side) for own in OURS for side in BASELINES if own in seconds and side in seconds]
            note = "" if kind == "seconds" else ", without a graph"
            found += [
                f"- {own} {seconds[side] / seconds[own]:.2f} of {side}{note}: {row['case']}"
                for own, side in pairs
                if seconds[own] > seconds[side]
            ]
    return found


def refusals(lines: Sequence[Line]) -> list[str]:
    """Sides and cases that could not run, and why; steps of the script that were cut short."""
    found = []
    for line in lines:
        if line.get("family") == "script" and line.get("state") != "ok":
            found.append(f"- step {line['step']}: {line['state']}")
        groups = [line, *(line.get(k) for k in ("forward", "forward + backward"))]
        for group in (g for g in groups if isinstance(g, dict)):
            found += [f"- {side}: {why}" for side, why in group.get("refused", {}).items()]
        if line.get("state") in ("failed", "crashed") and not str(line["family"]).startswith("tests "):
            found.append(f"- {line['family']}, {line['case']}: {line['state']}: {line.get('reason', '')}")
    return list(dict.fromkeys(found))


def into_readme(lines: Sequence[Line], readme: Path) -> None:
    """Replaces what stands between the marks of README by the result's conditions and summaries.

    Raises:
        ValueError: README has no marks, or the result is a rehearsal.
    """
    if "STUB" in conditions(lines):
        raise ValueError("--readme: the result is a rehearsal's: only measurements go into README")
    text = readme.read_text(encoding="utf-8")
    found = re.search(re.escape(BEGIN) + r".*?" + re.escape(END), text, re.S)
    if found is None:
        raise ValueError(f"--readme: {readme} has no line {BEGIN}")
    table_text = "\n".join([BEGIN, conditions(lines), "", *summaries(table(lines)), *others(lines)]).rstrip()
    readme.write_text(text[: found.start()] + f"{table_text}\n{END}" + text[found.end() :], encoding="utf-8")
