"""`ffnas prepare`: pre-training text to shards that `ffnas search --data.text FOLDER` maps (`engine.data.prepare`)."""

from __future__ import annotations

import argparse

EXAMPLES = """
examples:
  ffnas prepare --text wiki.txt --out text/wiki
  ffnas prepare --text '[wikimedia/wikipedia:20231101.en,bookcorpus/bookcorpus]' --join '[1,64]' --weights '[1,2]' \\
      --tokenizer bert-base-uncased --out text/wiki-books
  ffnas search --data.text text/wiki-books ...

Called again with the same options it goes on where it was stopped.
"""


def command(argv: list[str]) -> None:
    """Prepares text; raises `UserError` when the input is wrong."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    from engine.data.prepare import PrepareConfig, prepare_text
    from engine.errors import UserError
    from search.config.options import HelpFormatter, one_line
    from search.console.libraries import quiet
    from search.console.progress import Reporter

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="ffnas prepare",
        description="Tokenize and pack text into memory-mapped shards.",
        epilog=EXAMPLES,
        exit_on_error=False,
        formatter_class=HelpFormatter,
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
    quiet()
    reporter = Reporter()
    with reporter.phase("tokens (M)", 0) as bar:
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
