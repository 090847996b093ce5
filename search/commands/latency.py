"""`ffnas latency --build-table`: measure what layers cost on this device, for searches with a latency budget.

`ffnas latency MODEL...` compares finished models instead (`search.commands.model_latency`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import UserError

if TYPE_CHECKING:
    from engine.latency.table import LatencyTable

USAGE = """usage: ffnas latency --build-table [--output FILE] [--json] [options of ffnas search]
       ffnas latency MODEL... [options]

--build-table measures random architectures of a search's student on this device, finds what every
(stack, ratio) and operator costs, and compares its predictions with 50 further architectures. The
table goes into the cache, where a search with the same student and conditions finds it
(--budget.latency-ms, --objectives score,latency), or into FILE.

  ffnas latency --build-table                             the default student, one sequence
  ffnas latency --build-table --preset paper --objectives.batch_size 8 --objectives.threads 4
  ffnas latency --build-table --student.hidden_size 360 --output table.json

Without --build-table, finished models are compared over runtimes and batch sizes; see
ffnas latency MODEL --help.
"""


def command(argv: list[str]) -> None:
    """Builds a table, or hands models over to their comparison."""
    if not argv or argv in (["-h"], ["--help"]):
        print(USAGE, end="")
        return
    if "--build-table" in argv:
        build([a for a in argv if a != "--build-table"])
        return
    from search.commands.model_latency import command as compare_models

    compare_models(argv)


def build(argv: list[str]) -> None:
    """Measures a table for the student of the search options `argv` and writes it."""
    from search.config.options import parse
    from search.console.progress import Reporter

    output, argv = _take(argv, "--output")
    as_json, argv = "--json" in argv, [a for a in argv if a != "--json"]
    if output is not None and not Path(output).resolve().parent.is_dir():
        raise UserError(f"--output: the folder of {output!r} does not exist: create it or give another path")
    config, _ = parse(argv, prog="ffnas latency --build-table")
    with Reporter() as reporter:
        reporter.doing("loading PyTorch")
        from search.config.latency_tables import conditions, default_path, describe, measure
        from search.config.space import student_space
        from search.console.libraries import quiet

        quiet()
        reporter.doing("building the supernet")
        space, heads = student_space(config)
        at = conditions(config)
        table = measure(space, heads, at, reporter, config.seed)
        reporter.info(f"latency table: {describe(table, config.budget.latency_ms)}")
    path = Path(output) if output is not None else default_path(space, heads, at)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.save(path)
    if as_json:
        print(json.dumps(json.loads(path.read_text(encoding="utf-8")), indent=1))
    else:
        for line in rows(table):
            reporter.info(line)
    reporter.info(f"table: {path}")


def rows(table: LatencyTable) -> list[str]:
    """The table for people: milliseconds of a layer's GELU FFNs, by stack and ratio."""
    from engine.architecture.architecture import LayerSpec
    from kernels.language.expression import GELU_FFN

    stacks = list(dict.fromkeys(n for n, _ in table.layers))
    ratios = list(dict.fromkeys(r for _, r in table.layers))
    lines = [f"fixed (embedding, attention, pooler): {table.fixed:.3f} ms; GELU FFNs of one layer, ms:"]
    lines.append("  ratio    " + "".join(f"stack {n:<4}" for n in stacks))
    for ratio in ratios:
        cells = (f"{table.layer(LayerSpec(GELU_FFN, n, ratio)):<10.3f}" for n in stacks)
        lines.append(f"  {ratio!s:<9}" + "".join(cells).rstrip())
    return lines


def _take(argv: list[str], option: str) -> tuple[str | None, list[str]]:
    """The value of an option and the arguments without it."""
    rest: list[str] = []
    value, arguments = None, iter(argv)
    for argument in arguments:
        if argument == option:
            value = next(arguments, None)
            if value is None:
                raise UserError(f"{option} needs a value")
        elif argument.startswith(f"{option}="):
            value = argument.partition("=")[2]
        else:
            rest.append(argument)
    return value, rest
