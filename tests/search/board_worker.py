"""One process of the tests of boards: the trial loop with an evaluation that takes no model, only a moment.

    python board_worker.py rank   FOLDER          one of the ranks the environment describes
    python board_worker.py ledger FOLDER URL      a worker on a shared ledger

Every evaluation appends a line to FOLDER/evaluations; after DIE_AFTER of its own, the process kills itself in one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from engine.architecture.shape import ModelShape
from engine.training.parallel import RankLost, join
from kernels.language.expression import GELU_FFN
from search.console.progress import silent
from search.ledger.board import Board, RankBoard
from search.ledger.ledger import Ledger, Trial
from search.ledger.shared_board import LedgerBoard
from search.samplers import make_sampler
from search.scoring.halving import SuccessiveHalving, attributes
from search.scoring.trials import Result, TrialLog, run_trials
from search.space import SearchSpace

SHAPE = ModelShape(hidden_size=24, num_layers=3, ffn_size=24, vocab_size=100, embedding_size=8, teacher_hidden_size=16)
TOTAL = 40
SHARED = {"together": 4, "concurrent": 3}
KINDS = {"plain": {}, "halving": {"compared": True}}


def space_of_shapes() -> SearchSpace:
    return SearchSpace(SHAPE).with_expressions((GELU_FFN,) * 3)


def quality(architecture) -> float:
    return sum((i + 1) * layer.stack / layer.ratio.denominator for i, layer in enumerate(architecture.layers)) / 24


class Evaluate:
    """Scores candidates; with `halving`, those behind at a rung stop there."""

    def __init__(self, folder: Path | None, kind: str = "plain", pause: float = 0.0, die_after: int = 10**9) -> None:
        self.folder, self.kind, self.pause, self.left = folder, kind, pause, die_after

    def __call__(self, architectures, peers) -> list[Result]:
        halving = SuccessiveHalving(1 if self.kind == "halving" else 0, 3, 9, peers)
        scores = [quality(a) for a in architectures]
        goes_on = halving.go_on(3, scores) if halving.steps else [True] * len(scores)
        results = []
        for architecture, score, on in zip(architectures, scores, goes_on, strict=True):
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1
            time.sleep(self.pause)
            if self.folder is not None:
                with open(self.folder / "evaluations", "a") as file:
                    file.write(f"{os.getpid()} {architecture}\n")
            attrs = attributes({3: score}) if halving.steps else {}
            results.append(Result(score if on else score / 2, None if on else "stopped", 0.1, not on, attrs))
        return results


def search(ledger: Ledger, board: Board | None, evaluate: Evaluate, total: int = TOTAL) -> TrialLog:
    space = space_of_shapes()
    sampler = make_sampler("evolution", space, 3, population=6)
    shared = {**SHARED, **KINDS[evaluate.kind]}
    return run_trials("stage1", total, sampler, space, evaluate, ledger, silent(), board=board, **shared)


def outcome(trials: list[Trial]) -> list[tuple]:
    """What may not depend on who evaluated what."""
    return [(t.number, str(t.architecture), t.score, t.state, t.reason, t.attrs) for t in trials]


def main() -> None:
    mode, folder, kind = sys.argv[1], Path(sys.argv[2]), os.environ.get("KIND", "plain")
    evaluate = Evaluate(folder, kind, float(os.environ.get("PAUSE", "0.03")), int(os.environ.get("DIE_AFTER", 10**9)))
    if mode == "ledger":
        with Ledger(sys.argv[3], run="test", heartbeat=1, grace=3) as ledger:
            log = search(ledger, LedgerBoard(ledger, "stage1", {"kind": kind}), evaluate)
        (folder / f"{os.getpid()}.json").write_text(json.dumps(outcome(log.trials)))
        return
    with join(cuda=False) as ranks:
        place = folder / "study.db" if ranks.is_first else folder / f"unused-{ranks.rank}.db"
        try:
            with Ledger(place) as ledger:
                log = search(ledger, RankBoard(ranks, ledger, "stage1", silence=2.0), evaluate)
                (folder / f"rank{ranks.rank}.json").write_text(json.dumps(outcome(log.trials)))
                if "DEATHS" in os.environ:
                    ranks.agree(lambda: None)  # a collective can only fail now
        except RankLost:  # also in the search, by a rank that is slower than the first one, who holds the store
            os._exit(3)


if __name__ == "__main__":
    main()
