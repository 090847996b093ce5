"""Latency tables of a search: found in the cache, read from a file, or measured.

A table is kept under a name made of everything it depends on (student, space, conditions, processor), so that it is
measured once per device and found by every later search. It is measured on random architectures over the whole range of
(stack, ratio), not only those in the budget, so that it serves every budget.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engine.architecture.architecture import Architecture
from engine.architecture.shape import ModelShape
from engine.errors import UserError
from engine.latency.build import ROUNDS, SECONDS, Clock, build_table
from engine.latency.table import TRUSTED, Conditions, LatencyTable, hardware, identity
from engine.training.precision import choose_device
from kernels.cache import cache_dir
from search.config.schema import SearchConfig
from search.console.progress import Reporter
from search.space import SearchSpace

TRAINING, CHECK = 100, 50
"""Random architectures a table is made from, and others it is checked on."""


def conditions(config: SearchConfig) -> Conditions:
    """What latencies of this search are measured under; fp32, as an exported model is loaded."""
    device = choose_device(config.device).type
    return Conditions(
        batch_size=config.objectives.batch_size,
        sequence_length=config.objectives.sequence_length or config.data.max_length,
        threads=config.objectives.threads,
        precision="fp32",
        device=device,
        hardware=hardware(device),
    )


def default_path(space: SearchSpace, heads: int, at: Conditions) -> Path:
    """Where the table of this student is kept."""
    name = identity(space.shape, heads, space.policy, space.stacks, space.ratios, at)
    return cache_dir() / "latency" / f"{name}.json"


def measure(space: SearchSpace, heads: int, at: Conditions, reporter: Reporter, seed: int = 0) -> LatencyTable:
    """Measures a table for all of `space`, whatever its budget."""
    everything = SearchSpace(
        space.shape,
        budget=space.reachable(),
        stacks=space.stacks,
        ratios=space.ratios,
        activations=space.activations,
        binaries=space.binaries,
        heights=space.heights,
        policy=space.policy,
    )
    rng = np.random.default_rng(seed)
    training, check = _draw(everything, TRAINING, rng), _draw(everything, CHECK, rng)
    clock = Clock(space.shape, heads, space.policy, at, space.stacks, space.ratios)
    with reporter.phase("latency table", ROUNDS[1], most=True, limit=SECONDS) as bar:
        return build_table(clock, training, check, progress=lambda done, _: bar.update(done, "rounds"))


def describe(table: LatencyTable, limit: float | None = None) -> str:
    """Conditions and check of a table in one line, and what it makes of a limit in milliseconds."""
    check = table.check
    if check is None:
        return f"{table.conditions}: not checked, so unfit"
    said = (
        f"{table.conditions}: off by {check.mean_error:.1%} on average, {check.worst_error:.1%} at worst, rank"
        f" correlation {check.rank_correlation:.3f}, on {len(check.pairs)} architectures"
    )
    if not table.fit(limit):
        near = "" if limit is None else f" near {limit:.3g} ms"
        return f"{said}; UNFIT, a tenth of its predictions{near} are off by {check.error(limit):.1%} or more"
    if limit is None:
        return said
    return f"{said}; for at most {limit:.3g} ms it has to predict at most {table.allowed(limit):.3g}"


def stated(table: LatencyTable, limit: float | None) -> dict[str, float | None]:
    """The check of a table as summary.json holds it, and the most it may predict where `limit` ms are asked for."""
    if table.check is None:
        return {}
    check = table.check
    return {
        "mean_error": check.mean_error,
        "worst_error": check.worst_error,
        "rank_correlation": check.rank_correlation,
        "architectures": len(check.pairs),
        "allowed_ms": None if limit is None else table.allowed(limit),
    }


def table_for(config: SearchConfig, space: SearchSpace, heads: int, reporter: Reporter) -> LatencyTable:
    """The table a search with a latency budget or objective uses; measured now if there is none. Says how good it is.

    Raises:
        UserError: a given table cannot be read or is of another student or other conditions, or the table is unfit.
    """
    at, given, limit = conditions(config), config.objectives.latency_table, config.budget.latency_ms
    path = Path(given) if given is not None else default_path(space, heads, at)
    if given is None and not path.is_file():
        reporter.info(f"latency: no table for this student and device yet; measuring one ({at})")
        table = measure(space, heads, at, reporter, config.seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        table.save(path)
    else:
        table = LatencyTable.load(path)
        require_match(table, path, space, heads, at)
    if not table.fit(limit) and not config.objectives.unfit_table:
        raise UserError(
            f"latency table {path}: cannot be trusted with a limit ({describe(table, limit)}, {TRUSTED:.0%} is"
            " accepted): measure it again on a quieter machine with ffnas latency --build-table, or accept it with"
            " --objectives.unfit_table true"
        )
    reporter.info(f"latency table: {describe(table, limit)}")
    return table


def require_match(table: LatencyTable, path: Path, space: SearchSpace, heads: int, at: Conditions) -> None:
    """Raises `UserError` unless a table is of this student and these conditions (its processor may be another: a
    table measured on the device that will run the model serves a search elsewhere)."""
    size, own = table.shape, space.shape
    pairs = [
        *((name, getattr(size, name), getattr(own, name)) for name in ModelShape.__slots__ if name not in _FREE),
        ("num_heads", table.heads, heads),
        ("space.policy", table.policy, space.policy),
        *((name, getattr(table.conditions, name), getattr(at, name)) for name in _CONDITIONS),
    ]
    for name, found, wanted in pairs:
        if found != wanted:
            raise UserError(
                f"latency table {path}: was measured for {name} {found}, this search has {wanted}: build one for it"
                " with ffnas latency --build-table and the search's options"
            )
    missing = [f"stack {n}, ratio {r}" for n, r in space.shapes if (n, r) not in table.layers]
    if missing:
        raise UserError(f"latency table {path}: has no entry for {missing[0]}: build one for this space")


_FREE = ("vocab_size", "teacher_hidden_size", "max_positions", "type_vocab", "num_heads")
_CONDITIONS = ("batch_size", "sequence_length", "threads", "precision")


def _draw(space: SearchSpace, count: int, rng: np.random.Generator) -> list[Architecture]:
    return [space.sample(rng) for _ in range(count)]
