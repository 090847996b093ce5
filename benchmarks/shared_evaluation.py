"""Candidates per second of stage 3's scoring: one by one, with shared work, and racing.

    python -m benchmarks.shared_evaluation              200 random in-budget candidates; seven minutes on one core
    python -m benchmarks.shared_evaluation --show FILE  prints a result again

The supernet is `benchmarks.demo_supernet`'s (H = 192, 3 layers, 596 sentences). Sides:

    eager        one by one in plain PyTorch, all tokens of all layers, batches of 256 sorted by length (measured on
                 every 40th candidate)
    one by one   the same batches on the fast kernels, the last layer for the first token alone as in any prediction
    shared       `engine.evaluation.shared`, same batches, an empty store
    racing       the same with `engine.evaluation.racing` over 10 random slices, one batch each, as stage 3 has them

Checked: shared logits equal one-by-one logits bit for bit; survivors' scores equal one-by-one scores over the same
batches; every side has the same winner. Further rows: candidates given one at a time, and candidates from mutations
instead of random ones. `--checked 50` compares only every fourth candidate bit for bit, and is a minute shorter.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.demo_supernet import SPLITS, Supernet
from benchmarks.environment import describe
from engine.architecture.architecture import Architecture
from engine.evaluation.evaluation import predict_batches
from engine.evaluation.metrics import compute_metrics
from engine.evaluation.race_subnets import race_subnets
from engine.evaluation.racing import Finish
from engine.evaluation.shared import SharedEvaluator
from engine.evaluation.trie import build_trie, work_apart, work_shared
from kernels import use_backend
from search.scoring.shared_scores import RACE_BATCH

RESULTS = Path(__file__).parent / "results"
SLICES = 10


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


def timed(sides: dict[str, Callable[[], object]], rounds: int) -> tuple[dict[str, list[float]], dict[str, object]]:
    """Seconds of every side in every round, in turns, and the last results; processor time where one thread computes.

    The order is reversed every round.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    results: dict[str, object] = {}
    for turn in range(rounds):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            start = clock()
            results[name] = sides[name]()
            seconds[name].append(clock() - start)
    return seconds, results


@contextmanager
def whole_layers(model: PreTrainedModel) -> Iterator[None]:
    """Predictions compute all tokens of the last layer meanwhile, for they are asked for hidden states."""
    before = model.config.output_hidden_states
    model.config.output_hidden_states = True
    try:
        yield
    finally:
        model.config.output_hidden_states = before


def measure(net: Supernet, count: int, rounds: int, checked: int) -> dict[str, object]:
    model, data, spec = net.model, getattr(net.ctx.data, SPLITS[0]), net.ctx.spec
    candidates = random_candidates(net, count)
    batches = SharedEvaluator(model, data).batches
    labels = np.concatenate([b.labels.numpy() for b in batches])

    def apart(chosen: Sequence[Architecture]) -> np.ndarray:
        return np.stack([predict_batches(model, batches, architecture=a)[0] for a in chosen])

    def accuracy(logits: np.ndarray) -> list[float]:
        return [compute_metrics(spec, row, labels)["accuracy"] for row in logits]

    mutated = mutated_candidates(net, count)

    def eager() -> np.ndarray:
        with use_backend("reference"), whole_layers(model):
            return apart(candidates[::40])

    def raced() -> tuple[SharedEvaluator, list[Finish]]:
        evaluator = SharedEvaluator(model, data, slices=SLICES, batch_size=RACE_BATCH)
        return evaluator, race_subnets(evaluator, candidates, spec)

    def one_at_a_time() -> None:
        single = SharedEvaluator(model, data)
        for a in candidates:
            single.logits([a])

    apart(candidates[:2])
    SharedEvaluator(model, data).logits(candidates[:2])
    sides: dict[str, tuple[int, Callable[[], object]]] = {
        "eager": (len(candidates[::40]), eager),
        "one by one": (len(candidates[::20]), lambda: apart(candidates[::20])),
        "shared": (count, lambda: SharedEvaluator(model, data).logits(candidates)),
        "racing": (count, raced),
        "shared, one at a time": (count, one_at_a_time),
        "mutations, one by one": (len(mutated[::20]), lambda: apart(mutated[::20])),
        "mutations, shared": (count, lambda: SharedEvaluator(model, data).logits(mutated)),
    }
    seconds, results = timed({name: run for name, (_, run) in sides.items()}, rounds)
    each = {name: [t / sides[name][0] for t in times] for name, times in seconds.items()}
    together = results["shared"]
    evaluator, finishes = results["racing"]  # type: ignore[misc]
    some = range(0, count, max(1, round(count / checked)))
    logits = apart([candidates[i] for i in some])

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
        "seconds per candidate": {name: statistics.median(times) for name, times in each.items()},
        "rounds": each,
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
    """Candidates a second, and the medians of the rounds' ratios, with the smallest and the largest."""
    rounds: dict[str, list[float]] = result["rounds"]  # type: ignore[assignment]
    seconds: dict[str, float] = result["seconds per candidate"]  # type: ignore[assignment]

    def over(base: str, name: str) -> str:
        ratios = sorted(b / t for b, t in zip(rounds[base], rounds[name], strict=True))
        return f"{statistics.median(ratios):.1f} ({ratios[0]:.1f}-{ratios[-1]:.1f})"

    lines = [json.dumps(result["environment"]), f"{'':26}{'candidates/s':>14}{'vs one by one':>20}{'vs eager':>20}"]
    for name, value in seconds.items():
        base = "mutations, one by one" if name.startswith("mutations") else "one by one"
        lines.append(f"{name:26}{1 / value:14.1f}{over(base, name):>20}{over('eager', name):>20}")
    rest = {k: v for k, v in result.items() if k not in ("environment", "seconds per candidate", "rounds")}
    return "\n".join([*lines, *(f"{name}: {value}" for name, value in rest.items())])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shared_evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--candidates", type=int, default=200)
    parser.add_argument("--checked", type=int, default=200, help="candidates evaluated one by one too")
    parser.add_argument("--rounds", type=int, default=5, help="all sides in turns; medians are reported")
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
