"""Candidates per second of stage 3's scoring: one by one, with shared work, and racing.

    python -m benchmarks.shared_evaluation              200 random in-budget candidates; five minutes on one core
    python -m benchmarks.shared_evaluation --show FILE  prints a result again

The supernet is `benchmarks.demo_supernet`'s (H = 192, 3 layers, 596 sentences). Sides:

    eager        one by one, FFNAS_BACKEND=reference, batches of 256 sorted by length (measured on every 20th candidate)
    one by one   the same on the fast kernels
    shared       `engine.shared_evaluation`, same batches, an empty store
    racing       the same with `engine.racing` over 8 random slices, batches of 64, as stage 3 has them

Checked: shared logits equal one-by-one logits bit for bit; survivors' scores equal one-by-one scores over the same
batches; every side has the same winner. Further rows: candidates given one at a time, and candidates from mutations
instead of random ones. `--checked 50` evaluates only every fourth candidate one by one, in two minutes.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.demo_supernet import SPLITS, Supernet
from benchmarks.environment import describe
from engine.architecture import Architecture
from engine.evaluation import predict_batches
from engine.metrics import compute_metrics
from engine.race_subnets import race_subnets
from engine.racing import Finish
from engine.shared_evaluation import SharedEvaluator
from engine.trie import build_trie, work_apart, work_shared
from kernels import use_backend
from search.shared_scores import RACE_BATCH

RESULTS = Path(__file__).parent / "results"
SLICES = 8


def random_candidates(net: Supernet, count: int, seed: int = 0) -> list[Architecture]:
    """Different random candidates in the budget."""
    rng = np.random.default_rng(seed)
    found: dict[Architecture, None] = {}
    while len(found) < count:
        found[net.budgeted.sample(rng)] = None
    return list(found)


def mutated_candidates(net: Supernet, count: int, seed: int = 0) -> list[Architecture]:
    """Different candidates, most of them mutations of some of the first ten: what evolution proposes."""
    rng = np.random.default_rng(seed)
    parents = random_candidates(net, 10, seed)
    found = dict.fromkeys(parents)
    while len(found) < count:
        found[net.budgeted.mutate(list(found)[int(rng.integers(len(found)))], rng)] = None
    return list(found)


def winner(candidates: Sequence[Architecture], scores: Sequence[float], net: Supernet) -> Architecture:
    """Best score, ties to fewer parameters, then to the earlier."""
    order = range(len(candidates))
    return candidates[min(order, key=lambda i: (-scores[i], net.budgeted.parameters(candidates[i]), i))]


def timed(function: Callable[[], object], rounds: int = 1) -> tuple[float, object]:
    """Median seconds of `rounds` calls, and the last result; processor time where one thread computes."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds, result = [], None
    for _ in range(rounds):
        start = clock()
        result = function()
        seconds.append(clock() - start)
    return statistics.median(seconds), result


def measure(net: Supernet, count: int, rounds: int, checked: int) -> dict[str, object]:
    model, data, spec = net.model, getattr(net.ctx.data, SPLITS[0]), net.ctx.spec
    candidates = random_candidates(net, count)
    batches = SharedEvaluator(model, data).batches
    labels = np.concatenate([b.labels.numpy() for b in batches])

    def apart(chosen: Sequence[Architecture]) -> np.ndarray:
        return np.stack([predict_batches(model, batches, architecture=a)[0] for a in chosen])

    def accuracy(logits: np.ndarray) -> list[float]:
        return [compute_metrics(spec, row, labels)["accuracy"] for row in logits]

    apart(candidates[:2])
    SharedEvaluator(model, data).logits(candidates[:2])
    few = candidates[::20]
    with use_backend("reference"):
        eager, _ = timed(lambda: apart(few), rounds)
    some = range(0, count, max(1, round(count / checked)))
    one, logits = timed(lambda: apart([candidates[i] for i in some]))
    shared, together = timed(lambda: SharedEvaluator(model, data).logits(candidates), rounds)

    def raced() -> tuple[SharedEvaluator, list[Finish]]:
        evaluator = SharedEvaluator(model, data, slices=SLICES, batch_size=RACE_BATCH)
        return evaluator, race_subnets(evaluator, candidates, spec)

    racing, (evaluator, finishes) = timed(raced, rounds)  # type: ignore[misc]
    single = SharedEvaluator(model, data)
    apart_shared, _ = timed(lambda: [single.logits([a]) for a in candidates])
    mutated = mutated_candidates(net, count)
    mutated_shared, _ = timed(lambda: SharedEvaluator(model, data).logits(mutated), rounds)
    mutated_one, _ = timed(lambda: apart(mutated[::20]))

    scores = accuracy(together)  # type: ignore[arg-type]
    survivors = [i for i, f in enumerate(finishes) if f.survived]
    exact = [
        compute_metrics(spec, *predict_batches(model, evaluator.batches, architecture=candidates[i]))["accuracy"]
        for i in survivors
    ]
    raced_scores = [f.score if f.survived else -1.0 for f in finishes]
    best = winner(candidates, scores, net)
    plans = [model.base_model.planner(a) for a in candidates]
    return {
        "environment": describe(),
        "candidates": count,
        "examples": len(labels),
        "seconds per candidate": {
            "eager": eager / len(few),
            "one by one": one / len(some),
            "shared": shared / count,
            "racing": racing / count,
            "shared, one at a time": apart_shared / count,
            "mutations, one by one": mutated_one / len(mutated[::20]),
            "mutations, shared": mutated_shared / count,
        },
        "work": {"one by one": work_apart(plans)._asdict(), "shared": work_shared(build_trie(plans))._asdict()},
        "compared one by one": len(some),
        "bitwise equal": bool(np.array_equal(logits, together[list(some)])),  # type: ignore[index]
        "survivors": len(survivors),
        "survivors exact": bool(np.array_equal(exact, [finishes[i].score for i in survivors])),
        "answers asked": sum(f.answered for f in finishes) / (count * len(labels)),
        "score range": [min(scores), max(scores)],
        "winner": str(best),
        "same winner": best == winner(candidates, raced_scores, net),
    }


def show(result: dict[str, object]) -> str:
    seconds: dict[str, float] = result["seconds per candidate"]  # type: ignore[assignment]
    lines = [json.dumps(result["environment"]), f"{'':26}{'candidates/s':>14}{'vs one by one':>15}{'vs eager':>10}"]
    for name, value in seconds.items():
        base = seconds["mutations, one by one" if name.startswith("mutations") else "one by one"]
        lines.append(f"{name:26}{1 / value:14.1f}{base / value:15.1f}{seconds['eager'] / value:10.1f}")
    rest = {k: v for k, v in result.items() if k not in ("environment", "seconds per candidate")}
    return "\n".join([*lines, *(f"{name}: {value}" for name, value in rest.items())])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shared_evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--candidates", type=int, default=200)
    parser.add_argument("--checked", type=int, default=200, help="candidates evaluated one by one too")
    parser.add_argument("--rounds", type=int, default=3, help="of the fast sides; medians are reported")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/, named after the processor)")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print a result again and measure nothing")
    args = parser.parse_args(argv)
    if args.show:
        if not args.show.is_file():
            print(f"--show: no file {args.show}; results are in {RESULTS}", file=sys.stderr)
            return 2
        print(show(json.loads(args.show.read_text())))
        return 0
    result = measure(Supernet(), args.candidates, args.rounds, args.checked)
    print(show(result))
    environment: dict[str, object] = result["environment"]  # type: ignore[assignment]
    slug = re.sub(r"[^a-z0-9]+", "-", str(environment["processor"]).lower()).strip("-")
    name = f"shared-evaluation-{slug}-{environment['threads']}-threads-{str(environment['date'])[:10]}.json"
    out = args.out or RESULTS / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
