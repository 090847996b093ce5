"""`--help` fits a screen, comes at once, teaches, and shows the defaults of the preset that is asked for."""

import contextlib
import dataclasses
import re
import resource

import pytest
from newcomer import started

from search.cli import COMMANDS, main
from search.config.help import SEARCH, TEACHING
from search.config.options import parse, preset_names

LINES, COLUMNS = 45, 100
SECONDS = 1.5
"""Of a processor, start of Python included; the clock on the wall says the same where nothing else runs."""


def shown(capsys, *arguments):
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [*([name] for name in COMMANDS), [], ["latency", "MODEL"]], ids=" ".join)
def test_one_screen(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    with contextlib.suppress(SystemExit):  # argparse's way to end
        main([*command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert 2 < len(lines) <= LINES
    assert [line for line in lines if len(line) > COLUMNS] == []
    assert "\x1b" not in "".join(lines)


def test_no_help_loads_a_framework():
    code = (
        "import sys; from search.cli import COMMANDS, main\n"
        "for name in COMMANDS:\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit: pass\n"
        "    print(name, sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)), file=sys.stderr)"
    )
    told = started(code=code).stderr.splitlines()
    assert told == [f"{name} []" for name in COMMANDS]


@pytest.mark.parametrize(
    "arguments",
    [["search", "--help"], ["search", "--help-all"], ["search", "--data.train", "missing.csv"], ["data", __file__],
     ["shrink", "package:none", "--train", "missing.csv"], ["predict", "m", "--data", "missing.csv"],
     ["derive", "--preset", "efficientbert-tiny", "--data.train", "missing.csv"]],
    ids=lambda arguments: " ".join(arguments[:2]),
)  # fmt: skip
def test_help_and_mistakes_in_files_come_at_once(arguments):
    def spent():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    started(*arguments)  # compiles what a first start compiles
    before = spent()
    done = started(*arguments)
    assert spent() - before < SECONDS
    assert done.returncode == (0 if arguments[1].startswith("--help") else 2)
    if done.returncode:
        assert len(done.stderr.splitlines()) == 1
        assert ("cannot read a .py" if arguments[0] == "data" else "missing.csv: no such file") in done.stderr


@pytest.mark.parametrize("preset", preset_names())
def test_defaults_are_those_of_the_preset(preset, capsys):
    """Against the values a search with that preset takes."""
    config, _ = parse(["--preset", preset])
    short = shown(capsys, "search", "--preset", preset, "--help")
    assert short.splitlines()[-1].endswith(f"--preset {preset} --help-all")
    for option in (o for group in SEARCH.values() for o in group):
        value = config
        for part in option.name.split("."):
            value = getattr(value, part, None)
        line = next(x for x in short.splitlines() if x.startswith(f"  --{option.name} "))
        assert line.endswith(f"({option.unset if value is None else value})" if value is not None or option.unset else
                             option.meaning)  # fmt: skip
    long = re.sub(r"\s+", " ", shown(capsys, "search", f"--preset={preset}", "--help-all"))
    for name, value in _flat(dataclasses.asdict(config), ""):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            text = long.partition(f" --{name} ")[2].partition(" --")[0]
            assert f"default: {value})" in text, (name, text)
    assert "/" not in long.partition("options:")[0].replace("[options]", "")  # no path of this machine


def _flat(values, prefix):
    for name, value in values.items():
        yield from _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]


def test_a_configuration_file_counts(tmp_path, capsys):
    (tmp_path / "my.yaml").write_text("seed: 41\ninherit: {batch_size: 7}\n")
    short = shown(capsys, "search", "--preset", "hour", "--config", str(tmp_path / "my.yaml"), "--help")
    assert "same result (41)" in short
    assert "texts per step (7)" in short
    assert main(["search", "--preset", "nil", "--help"]) == 2
    assert "preset: 'nil' is not known: choose one of demo" in capsys.readouterr().err


def test_help_in_the_middle_is_help(capsys):
    for command, word in (("shrink", "--speedup 4"), ("data", "reviews.csv"), ("predict", "--probabilities")):
        assert word in shown(capsys, command, "m", "--data.train", "--help")
    assert "usage: ffnas search" in shown(capsys, "search", "--resume", "--help")


def test_the_module_is_the_command(capsys):
    done = started(
        code="import runpy, sys; sys.argv[1:] = ['--help']; runpy.run_module('search.run', run_name='__main__')"
    )
    assert done.stdout == shown(capsys, "search", "--help")


def test_every_named_option_is_taken(tmp_path):
    """What help shows can be typed: every option of the two short helps is one of the parser's."""
    shown = {o for groups in (SEARCH, TEACHING) for group in groups.values() for o in group}
    values = {"SHARE": 0.5, "X": 2.0, "MS": 3.0, "N": 9, "LR": 1e-4}
    special = {"strategy": "inherit", "tracker": "none", "device": "cpu", "finetune.max_steps": 4}
    apart = {"config", "resume", "preset", "data.task", "budget.keep"}
    given = {o.name: special.get(o.name, values.get(o.value, "a")) for o in shown if o.name not in apart}
    for options in (given, {"data.task": "glue/cola"}, {"budget.keep": 0.5}):
        config, _ = parse([f"--{name}={value}" for name, value in options.items()])
        for name, value in options.items():
            found = config
            for part in name.split("."):
                found = getattr(found, part)
            assert found in (value, [value]), name


def test_prepare_tells_its_defaults(capsys):
    from engine.data.prepare import PrepareConfig

    text = shown(capsys, "prepare", "--help")
    for field in dataclasses.fields(PrepareConfig):
        line = re.search(rf"--{field.name.replace('_', '-')} .*(\n {{20,}}.*)*", text)
        assert line is not None
        if isinstance(field.default, (int, str)) and field.default:
            assert f"({field.default})" in line[0]
