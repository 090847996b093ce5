"""Samplers compared on a table of real scores: every (stack, ratio) choice of a 3-layer supernet, 16^3 = 4096.

    python -m benchmarks.samplers                  replays every sampler 30 times against the first table
    python -m benchmarks.samplers --table second   against the second
    python -m benchmarks.samplers --show           prints the committed result of the first (or the --table named)
    python -m benchmarks.samplers --build          trains the supernet and scores the table anew (five minutes)

The table holds the accuracy of every choice with shared weights (`benchmarks.demo_supernet`, scored by
`engine.evaluation.shared` on 3,192 held-out sentences). A replay proposes, looks the score up, observes.
The first table's supernet has the first three expressions of EfficientBERT's released architecture, the second one's
the last three; settings of samplers were tried on the first only. Regret is the table's best score minus the best found
so far; reported are its mean over seeds and a 95 % band (t).
Replays already done are kept in the cache folder, under a name made of the table and the sources of samplers and
spaces, so that an interrupted comparison goes on where it stopped.
Every sampler has its defaults, except that `partition` and `partition_greedy` start learning after as many random
candidates as the others (20; the paper's 80 are listed beside).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from benchmarks.environment import describe
from engine.architecture.architecture import Architecture, LayerSpec
from engine.architecture.shape import ModelShape
from engine.files import write_json_atomic
from kernels.cache import cache_dir
from kernels.language.expression import parse_expression
from search.ledger.ledger import Trial
from search.samplers import make_sampler
from search.space import SearchSpace

RESULTS = Path(__file__).parent / "results"
TABLES = ("first", "second")
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("random", {}),
    "partition": ("partition", {"startup": 20}),
    "partition (80 random)": ("partition", {"startup": 80}),
    "partition_greedy": ("partition_greedy", {"startup": 20}),
    "partition_greedy (80 random)": ("partition_greedy", {"startup": 80}),
    "evolution": ("evolution", {}),
    "local": ("local", {}),
    "tpe": ("tpe", {}),
    "nsga2": ("nsga2", {}),
    "gaussian": ("gaussian", {}),
}
EVALUATIONS = 250
Job = tuple[str, str, int, int]
"""Table, side, seed, evaluations."""
MARKS = (0.01, 0.02, 0.05, 0.06)
"""Shares of the table at which regret is listed; the third is what the default sampler is chosen by."""
CHOSEN_BY = 0.05


class Table:
    """Scores of all choices, and the space they come from."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content
        self.shapes = [(s, Fraction(r)) for s, r in content["shapes"]]
        self.expressions = tuple(parse_expression(e) for e in content["expressions"])
        self.scores = np.asarray(content["right"], dtype=np.float64) / content["examples"]
        shape = ModelShape(**content["shape"])
        self.space = SearchSpace(shape, budget=(0, 1e12)).with_expressions(self.expressions)
        self._place = {s: i for i, s in enumerate(self.shapes)}

    @property
    def best(self) -> float:
        return float(self.scores.max())

    def index(self, architecture: Architecture) -> int:
        """Row of an architecture: its layers' choices as digits, the first layer the most significant."""
        row = 0
        for layer in architecture.layers:
            row = row * len(self.shapes) + self._place[layer.stack, layer.ratio]
        return row


def architectures(shapes: Sequence[tuple[int, Fraction]], expressions: Sequence[Any]) -> list[Architecture]:
    """All choices, in the order of the table."""
    rows: list[tuple[LayerSpec, ...]] = [()]
    for expression in expressions:
        rows = [(*row, LayerSpec(expression, *shape)) for row in rows for shape in shapes]
    return [Architecture(row) for row in rows]


def table_file(name: str) -> Path:
    return RESULTS / f"sampler-table-{name}.json"


def build(name: str) -> dict[str, Any]:
    """Trains (or loads) the supernet and scores every choice."""
    from dataclasses import asdict

    from benchmarks.demo_supernet import EXPRESSIONS, OTHER_EXPRESSIONS, Supernet
    from engine.evaluation.shared import SharedEvaluator

    expressions = EXPRESSIONS if name == "first" else OTHER_EXPRESSIONS
    net = Supernet(expressions)
    evaluator = SharedEvaluator(net.model, net.held_out())
    shapes = list(net.space.shapes)
    all_of_them = architectures(shapes, [parse_expression(e) for e in expressions])
    labels = evaluator.labels()
    start = time.perf_counter()
    right: list[int] = []
    for first in range(0, len(all_of_them), 256):  # one choice of the first layer at a time
        logits = evaluator.logits(all_of_them[first : first + 256])
        right += (logits.argmax(-1) == labels).sum(axis=1).tolist()
        print(f"{len(right)}/{len(all_of_them)}", file=sys.stderr, flush=True)
    return {
        "environment": describe(),
        "seconds": time.perf_counter() - start,
        "shape": asdict(net.ctx.shape),
        "expressions": list(expressions),
        "shapes": [[s, str(r)] for s, r in shapes],
        "examples": len(labels),
        "right": right,
    }


@lru_cache(maxsize=2)
def read_table(name: str) -> Table:
    return Table(json.loads(table_file(name).read_text()))


def replay(name: str, side: str, seed: int, evaluations: int) -> list[float]:
    """Best score after 1..`evaluations` evaluations."""
    table = read_table(name)
    kind, options = SIDES[side]
    sampler = make_sampler(kind, table.space, seed, **options)
    best, curve = -np.inf, []
    for number in range(evaluations):
        architecture = sampler.propose(1)[0]
        score = float(table.scores[table.index(architecture)])
        sampler.observe([Trial("table", number, architecture, "", score, 1, 0.0)])
        best = max(best, score)
        curve.append(best)
    return curve


def compare(name: str, sides: Sequence[str], seeds: int, evaluations: int, workers: int) -> dict[str, Any]:
    table = read_table(name)
    sampled: dict[str, Any] = {}
    curves = replay_all([(name, side, seed, evaluations) for seed in range(seeds) for side in sides], workers)
    for side in sides:
        regret = table.best - np.array([curves[name, side, seed, evaluations] for seed in range(seeds)])
        half = student_t.ppf(0.975, seeds - 1) * regret.std(axis=0, ddof=1) / np.sqrt(seeds)
        sampled[side] = {
            "regret": np.round(regret.mean(axis=0), 6).tolist(),
            "half_band": np.round(half, 6).tolist(),
            "found_best": float((regret[:, -1] == 0).mean()),
        }
    return {
        "environment": describe(),
        "table": {
            "choices": len(table.scores),
            "best": table.best,
            "median": float(np.median(table.scores)),
            "worst": float(table.scores.min()),
        },
        "seeds": seeds,
        "evaluations": evaluations,
        "samplers": sampled,
    }


def replay_all(jobs: Sequence[Job], workers: int) -> dict[Job, list[float]]:
    """Every job's curve, from the file of finished ones where it is there."""
    finished, kept = {}, _kept_curves(jobs[0][0])
    if kept.exists():
        text = kept.read_text()
        kept.write_text(text[: text.rfind("\n") + 1])  # without what a kill left of the last line
        for line in kept.read_text().splitlines():
            job, curve = json.loads(line)
            finished[tuple(job)] = curve
    left = [job for job in jobs if job not in finished]
    with ProcessPoolExecutor(workers) as pool, kept.open("a") as file:
        running = {pool.submit(replay, *job): job for job in left}
        for number, future in enumerate(as_completed(running), 1):
            job = running[future]
            finished[job] = future.result()
            file.write(json.dumps([job, finished[job]]) + "\n")
            file.flush()
            print(f"\r{number}/{len(left)} replays", end="", file=sys.stderr, flush=True)
    return finished


def _kept_curves(name: str) -> Path:
    """File of finished replays; another one for another table or other sources."""
    root = Path(__file__).parents[1]
    sources = sorted([*(root / "search" / "samplers").glob("*.py"), *(root / "search" / "space").glob("*.py")])
    content = json.dumps(SIDES).encode() + b"".join(path.read_bytes() for path in [table_file(name), *sources])
    folder: Path = cache_dir() / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"samplers-{name}-{hashlib.sha256(content).hexdigest()[:16]}.jsonl"


def show(result: dict[str, Any]) -> str:
    table = result["table"]
    marks = [n for m in MARKS if (n := round(m * table["choices"])) <= result["evaluations"]]
    lines = [
        json.dumps(result["environment"]),
        f"table: {table['choices']} choices, accuracy {table['worst']:.4f} to {table['best']:.4f},"
        f" median {table['median']:.4f}; {result['seeds']} seeds; regret in percentage points, mean ± 95 % band",
        f"{'':30}" + "".join(f"{f'after {n}':>18}" for n in marks) + f"{'best found':>14}",
    ]
    chosen = round(CHOSEN_BY * table["choices"])
    order = sorted(result["samplers"], key=lambda s: result["samplers"][s]["regret"][chosen - 1])
    for side in order:
        row = result["samplers"][side]
        cells = [f"{100 * row['regret'][n - 1]:9.3f} ± {100 * row['half_band'][n - 1]:.3f}" for n in marks]
        lines.append(f"{side:30}" + "".join(f"{c:>18}" for c in cells) + f"{row['found_best']:>13.0%}")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Mean regret with bands against evaluations."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    steps = np.arange(1, result["evaluations"] + 1)
    for side, row in result["samplers"].items():
        mean, half = 100 * np.array(row["regret"]), 100 * np.array(row["half_band"])
        (line,) = axes.plot(steps, mean, label=side)
        axes.fill_between(steps, np.maximum(mean - half, 0), mean + half, alpha=0.15, color=line.get_color())
    axes.axvline(CHOSEN_BY * result["table"]["choices"], color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="evaluations", ylabel="regret (percentage points of accuracy)", xlim=(1, steps[-1]))
    axes.set_ylim(bottom=0)
    axes.set_title(f"{result['table']['choices']} choices, {result['seeds']} seeds, mean and 95 % band")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.samplers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", choices=TABLES, default=TABLES[0])
    parser.add_argument("--build", action="store_true", help="score the table anew")
    parser.add_argument("--show", action="store_true", help="print the last result and measure nothing")
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--evaluations", type=int, default=EVALUATIONS)
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file; the plot goes beside it (default: benchmarks/results/)")
    args = parser.parse_args(argv)
    out = args.out or RESULTS / f"samplers-{args.table}.json"
    if args.show:
        print(show(json.loads(out.read_text())))
        return 0
    if args.build or not table_file(args.table).exists():
        RESULTS.mkdir(exist_ok=True)
        write_json_atomic(table_file(args.table), build(args.table))
    result = compare(args.table, args.sides, args.seeds, args.evaluations, args.workers)
    print(show(result))
    write_json_atomic(out, result)
    plot(result, out.with_suffix(".png"))
    print(f"written: {out}, {out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
