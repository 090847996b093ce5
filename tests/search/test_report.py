"""The report: complete, self-contained, escaped; parts that are missing stay out, damaged ones are named."""

import base64
import io
import itertools
import json
import random
import re
import shutil
import warnings
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from report_runs import write_run

from engine.architecture.architecture import Architecture, LayerSpec, uniform
from engine.errors import UserError
from kernels.language.expression import GELU_FFN, parse_expression
from search.ledger.ledger import Trial
from search.report import build as building
from search.report import build_report
from search.report.data import Stage, read_run
from search.report.drawing import draw_architecture
from search.report.insights import _shares
from search.report.plots import losses, pareto, pareto_front, score_over_trials, time_per_phase
from search.report.tables import COLUMNS, Candidate, read_candidates, write_candidates
from search.report.theme import duration, millions, save, style

NASTY = "<script>alert('1')</script>$x_1$ & ü"
TINY = {"layers": 2, "hidden": 24, "trials": 4, "teacher_layers": 4}


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.images, self.text = [], [], [], []
        self.feed(text)
        self.words = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.links += [v for k, v in values.items() if k in ("href", "src", "srcset", "action", "data")]
        if tag == "img":
            self.images.append(values)

    def handle_data(self, data):
        if self.lasttag not in ("style", "title"):
            self.text.append(data)


@pytest.fixture
def quick(monkeypatch):
    """Plots are composed but not rasterized, which is what takes seconds."""
    picture = io.BytesIO()
    Image.new("RGB", (1, 1)).save(picture, "png")

    def save_nothing(made, path):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture.getvalue())

    monkeypatch.setattr(building, "save", save_nothing)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A finished run of 3 layers and 12 trials a stage, reported."""
    path = write_run(tmp_path_factory.mktemp("report") / "my run", layers=3, hidden=48, trials=12, teacher_layers=6)
    assert build_report(path) == path / "report.html"
    return path


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("template") / "run", **TINY)


@pytest.fixture
def tiny(template, tmp_path):
    """A fresh copy of a finished run of 2 layers and 4 trials a stage, not reported yet."""
    return Path(shutil.copytree(template, tmp_path / "run"))


def page(path):
    return Page((path / "report.html").read_text(encoding="utf-8"))


WITH_FEW_TRIALS = (
    *("architecture", "pareto", "score_over_trials", "losses", "time_per_phase", "cost_fronts", "operators", "latency"),
)


def test_report_stands_alone_with_all_plots(report):
    shown = page(report)
    assert all(link.startswith("data:image/png;base64,") for link in shown.links)
    assert not {"script", "link", "iframe", "object"} & set(shown.tags)
    assert len(shown.images) == len(WITH_FEW_TRIALS)
    embedded = [base64.b64decode(i["src"].partition(",")[2], validate=True) for i in shown.images]
    files = {p.name: p.read_bytes() for p in (report / "plots").iterdir()}
    assert set(files) == {f"{name}.png" for name in WITH_FEW_TRIALS}
    assert sorted(embedded) == sorted(files.values())
    for image in embedded:
        width, height = Image.open(io.BytesIO(image)).size
        assert width > 1200
        assert 300 < height < 2000
    assert all(i["alt"] for i in shown.images)


def test_report_states_the_results(report):
    words = page(report).words
    summary = json.loads((report / "summary.json").read_text())
    for expected in (
        *("0.7410", "0.7220", "0.7312", "0.7820", "Found architecture", "Hand-designed GELU", "Random search"),
        f"{summary['best']['params']:,}",
        f"{summary['best']['params_without_fit_dense']:,}",
        f"{109_482_240 / summary['best']['params_without_fit_dense']:.1f}×",
        *("not evaluated: 7.", "915 duplicate texts dropped", "2.13.0+cpu", "preset: demo"),
        "the loss is not finite at step #: {'total': nan}",
        "10 min",
    ):
        assert expected in words, expected
    assert "+0.0190 against hand-designed GELU" in words
    best = json.loads((report / "best" / "architecture.json").read_text())
    for layer in best["layers"]:
        assert layer["expression"].replace(",", ", ") in words


def test_report_is_reproducible_from_its_files(report, tmp_path):
    before = (report / "report.html").read_bytes()
    assert build_report(str(report)).read_bytes() == before


def test_text_from_files_is_escaped(tmp_path, quick):
    path = write_run(tmp_path / "<b>run", **TINY, name_of_teacher=NASTY)
    (path / "config.yaml").write_text(f"name: {NASTY}\n</pre>")
    summary = json.loads((path / "summary.json").read_text())
    summary["notes"] = [NASTY]
    summary["versions"][NASTY] = NASTY
    summary["seconds"][NASTY] = 9.0
    summary["best"]["metric"]["name"] = NASTY
    summary["baselines"][NASTY] = summary["baselines"]["gelu"]
    (path / "summary.json").write_text(json.dumps(summary))
    trials = [Trial("s", 0, uniform(GELU_FFN, 1, Fraction(1), 2), "k", None, 1, 1.0, "failed", NASTY)]
    write_candidates(path / "stage1" / "candidates.csv", trials)
    (path / "stage1" / "best.json").unlink()
    with (path / "log.jsonl").open("a") as file:
        file.write(json.dumps({"phase": NASTY, "step": 1, "loss": 0.5}) + "\n")
    html = build_report(path).read_text(encoding="utf-8")
    assert not re.search(r"<script|<b>|</pre>[^<]*</pre>", html)
    shown = Page(html)
    assert "script" not in shown.tags
    assert shown.words.count("<script>alert('1')</script>$x_1$ & ü") >= 5


HEADINGS = [
    *("Result", "Found architecture", "Parameters and scores", "Costs and scores", "Under other constraints"),
    *("Score over trials", "Trials", "Latency: prediction and measurement", "Losses", "Time", "Made with"),
    "Configuration",
]
"""Sections of a run of few trials: too few for the best decile and for a tree."""
SECTIONS = {
    None: [],
    "summary.json": ["Result", "Time"],
    "stage1": [],
    "stage2": [],
    "best": ["Found architecture"],
    "log.jsonl": ["Losses"],
    "config.yaml": ["Configuration"],
    "baselines": [],
    "latency_table.json": ["Latency: prediction and measurement"],
    "resolved": ["Under other constraints"],
}


EXTRAS = ("latency_table.json", "resolved")


def remove(path):
    if path.is_dir():
        for child in path.iterdir():
            remove(child)
        path.rmdir()
    else:
        path.unlink()


def headings(path):
    html = (path / "report.html").read_text(encoding="utf-8")
    return re.findall(r"<(?:h2|summary)>([^<]*)<", html)


@pytest.mark.parametrize("missing", SECTIONS)
def test_a_missing_part_leaves_its_section_out(tiny, quick, missing):
    if missing is not None:
        remove(tiny / missing)
    build_report(tiny)
    assert headings(tiny) == [h for h in HEADINGS if h not in SECTIONS[missing]]
    words = page(tiny).words
    assert ("This run has not finished" in words) == (missing == "summary.json")
    assert ("Stage 2: try more formulas" in words) == (missing != "stage2")


def test_parts_of_a_summary_may_be_missing(tiny, quick):
    path = tiny
    summary = json.loads((path / "summary.json").read_text())
    for part in ("stage1", "stage2", "stage3", "baselines", "best", "log.jsonl"):
        remove(path / part)
    for name in list(summary):
        (path / "summary.json").write_text(json.dumps({k: v for k, v in summary.items() if k != name}))
        build_report(path)
    summary["best"]["metric"] = None
    summary["baselines"] = {"gelu": None}
    del summary["teacher"]["layers"]
    (path / "summary.json").write_text(json.dumps(summary))
    build_report(path)


def test_a_skipped_search_reports_what_there_is(tiny, quick):
    path = tiny
    for name in ("summary.json", "best", "stage1", "stage2", "stage3", "baselines", "config.yaml", *EXTRAS):
        remove(path / name)
    build_report(path)
    assert headings(path) == ["Losses"]


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("")])
def test_no_run_is_reported(tmp_path, make):
    make(tmp_path / "run")
    with pytest.raises(UserError, match=r"does not exist|holds no results"):
        build_report(tmp_path / "run")


SUMMARY_DAMAGE = [
    ("best", [], "best: must be an object"),
    ("best", {"params": "many"}, "best.params: must be an integer"),
    (
        "best",
        {"params": 5, "metric": {"name": "f1", "value": None, "split": "dev"}},
        "best.metric.value: must be a num",
    ),
    ("best", {"params": 5, "metric": {"name": "f1", "value": float("nan"), "split": "dev"}}, "got nan"),
    ("teacher", {"params": True}, "teacher.params: must be an integer"),
    ("baselines", {"gelu": 3}, "gelu: must be an object"),
    ("trials", {"1": "x"}, "trials.1: must be an integer"),
    ("seconds", {"a": "x"}, "seconds.a: must be a number"),
    ("budget", {"params": [1]}, "budget.params: must be two numbers"),
    ("versions", 3, "versions: must be an object"),
    ("notes", "x", "notes: must be a list"),
]


@pytest.mark.parametrize(("name", "value", "message"), SUMMARY_DAMAGE, ids=[m for *_, m in SUMMARY_DAMAGE])
def test_a_damaged_summary_is_named(tmp_path, name, value, message):
    (tmp_path / "summary.json").write_text(json.dumps({"seed": 1, name: value}))
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read_run(tmp_path)
    assert str(tmp_path / "summary.json") in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("summary.json", "{"),
        ("summary.json", "[]"),
        ("summary.json", b"\xff\xfe"),
        ("stage1/candidates.csv", ""),
        ("stage1/candidates.csv", "number,score\n1,2\n"),
        ("stage1/candidates.csv", ",".join(COLUMNS) + "\n1,complete,0.5\n"),
        ("stage1/candidates.csv", ",".join(COLUMNS) + "\n1,complete,high,1,1.0,x,\n"),
        ("stage1/candidates.csv", ",".join(COLUMNS) + "\n1,complete,nan,1,1.0,x,\n"),
        ("stage1/candidates.csv", ",".join(COLUMNS) + "\n1,running,0.5,1,1.0,x,\n"),
        ("stage1/candidates.csv", ",".join(COLUMNS) + '\n1,complete,0.5,1,1.0,"x\n'),
        ("stage1/best.json", '{"number": "first"}'),
        ("best/architecture.json", '{"format": 1}'),
        ("best/architecture.json", "nonsense"),
        ("config.yaml", b"\xff\xfe"),
    ],
)
def test_a_damaged_file_is_named(tiny, file, content):
    path = tiny
    (path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=re.escape(str(path / file))) as caught:
        build_report(path)
    assert "\n" not in str(caught.value)
    assert not (path / "report.html").exists()


@pytest.mark.parametrize(
    "line",
    [b"nonsense", b'{"phase": 3, "step": 1}', b'{"phase": "a", "step": 1, "loss": "high"}', b"3", b'{"phase\xff\x00'],
)
def test_a_damaged_line_of_the_log_is_left_out_and_said(tmp_path, caplog, line):
    """Curves are for the reader: a damaged one must not keep a finished run from its report."""
    (tmp_path / "log.jsonl").write_bytes(b'{"phase": "a", "step": 1}\n' + line + b'\n{"phase": "a", "step": 2}\n')
    assert list(read_run(tmp_path).curves["a"].points) == [1, 2]
    assert caplog.messages == [f"{tmp_path / 'log.jsonl'}: 1 lines are damaged and left out, first line 2"]


def test_curves_of_a_resumed_run_count_every_step_once_and_wait_for_whole_lines(tmp_path):
    lines = [("a", 10, 1.0), ("a", 20, 0.8), ("a", 30, 0.7), ("a", 20, 0.9), ("b", 5, None)]
    text = "".join(json.dumps({"phase": p, "step": s, "loss": v, "hidden": 0.1}) + "\n" for p, s, v in lines)
    (tmp_path / "log.jsonl").write_text(text + '{"phase": "b", "st')
    curves = read_run(tmp_path).curves
    assert curves["a"].term("total") == ([10, 20, 30], [1.0, 0.9, 0.7])
    assert curves["b"].term("total") == ([], [])
    assert curves["b"].term("hidden") == ([5], [0.1])


def test_candidates_survive_the_table(tmp_path):
    architecture = uniform(GELU_FFN, 2, Fraction(1, 3), 3)
    trials = [
        Trial("s", 1, architecture, "k", None, 10**12, 1e-9, "failed", 'said "no",\nand again\r\nno; =1+1'),
        Trial("s", 0, architecture, "k", 0.1 + 0.2, 7, 1.25),
        Trial("s", 2, architecture, "k", -1e-300, 7, 0.0, "pruned", "late"),
    ]
    write_candidates(tmp_path / "c.csv", trials)
    rows = read_candidates(tmp_path / "c.csv")
    assert [(r.number, r.state, r.score, r.params, r.seconds, r.reason) for r in rows] == [
        (t.number, t.state, t.score, t.params, t.seconds, t.reason or "")
        for t in sorted(trials, key=lambda t: t.number)
    ]
    assert {r.architecture for r in rows} == {str(architecture)}
    assert (tmp_path / "c.csv").read_text().splitlines()[0] == ",".join(COLUMNS)


def test_pareto_front_agrees_with_its_definition():
    rng = random.Random(0)
    for _ in range(50):
        points = [(rng.randint(1, 12), rng.randint(1, 12) / 4) for _ in range(rng.randint(1, 25))]
        better = lambda a, b: a[0] <= b[0] and a[1] >= b[1] and a != b  # noqa: E731
        expected = sorted({p for p in points if not any(better(q, p) for q in points)})
        assert pareto_front(points) == expected


def composed(draw, *arguments, **options):
    """The figure, laid out without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with style():
            made = draw(*arguments, **options)
            if made is not None:
                made.canvas.draw()
    return made


def texts(made):
    return [t.get_text() for a in made.axes for t in a.texts if t.get_text()]


TRIALS = {
    "one": [(0, 0.5)],
    "equal": [(i, 0.5) for i in range(9)],
    "all failed": [(0, None), (1, None)],
    "failed but one": [(0, None), (1, -3.5), (2, None)],
    "many": [(i, (i * 37 % 101) / 100) for i in range(400)],
    "far apart": [(0, 1e-9), (1, 1e9)],
}


@pytest.mark.parametrize("trials", TRIALS.values(), ids=TRIALS)
def test_plots_bear_any_scores(tmp_path, trials):
    architecture = uniform(GELU_FFN, 1, Fraction(1), 1)
    made = [
        Trial("s", n, architecture, "k", s, 999_000 + n, 1.0, "failed" if s is None else "complete") for n, s in trials
    ]
    write_candidates(tmp_path / "stage1" / "candidates.csv", made)
    data = read_run(tmp_path)
    for draw in (score_over_trials, pareto):
        assert (composed(draw, data) is None) == all(s is None for _, s in trials)
    assert composed(losses, data) is None
    assert composed(time_per_phase, data) is None


@pytest.mark.parametrize("phases", [1, 2, 4, 12, 20])
def test_loss_panels(tmp_path, phases):
    with (tmp_path / "log.jsonl").open("w") as file:
        for phase, step in itertools.product(range(phases), range(1, 4 if phases < 20 else 2)):
            value = 10.0 ** -(step * (phase % 3)) if phase else 0.0
            file.write(json.dumps({"phase": f"phase $_{phase}", "step": step, "total": value, "hidden": value}) + "\n")
    made = composed(losses, read_run(tmp_path))
    titles = [a.get_title(loc="left") for a in made.axes if a.get_lines()]
    assert titles == [f"phase $_{i}" for i in range(min(phases, 12))]


def test_architecture_drawing_shows_every_layer_and_its_teacher():
    expression = parse_expression("tanh(linear(gelu(linear(max(x,tanh(x)),wb1)),wb2))")
    specs = [LayerSpec(GELU_FFN, 4, Fraction(1, 2)), LayerSpec(expression, 9, Fraction(1, 4))]
    architecture = type(uniform(GELU_FFN, 1, Fraction(1), 1))(tuple(specs))
    made = composed(
        draw_architecture,
        architecture,
        hidden_size=540,
        params=15_737_724,
        teacher="$bert_base$",
        teacher_layers=6,
        layer_map=[2, 5],
    )
    shown = texts(made)
    assert shown.count("1/2") == 4
    assert shown.count("9×") == 1  # a tall stack is one box
    assert shown.count("attention") == 2
    assert [f"layer {i}" for i in range(1, 7)] == [t for t in shown if t.startswith("layer ")]
    assert "2 layers, H = 540, 15.7 M parameters" in shown
    assert "$bert_base$" in shown
    for spec in specs:
        assert str(spec.expression) in " ".join(shown).replace("\n", "").replace(", ", ",")
    arrows = [t.arrow_patch for a in made.axes for t in a.texts if getattr(t, "arrow_patch", None)]
    assert len(arrows) == 2 + 1 + 2  # within the student; teacher's embedding; one per student layer


@pytest.mark.parametrize("layers", [1, 3, 24])
def test_architecture_drawing_without_a_teacher(layers):
    composed(draw_architecture, uniform(GELU_FFN, 1, Fraction(1), layers), hidden_size=8)


def test_a_png_is_the_same_every_time(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"seconds": {"a": 3.0, "total": 3.0, "b": 0.001}}))
    data = read_run(tmp_path)
    for name in ("1.png", "2.png"):
        save(composed(time_per_phase, data), tmp_path / name)
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (599, "9 min 59 s"),
        (1500, "25 min"),
        (3599, "1 h 00 min"),
        (18_420, "5 h 07 min"),
        (360_000, "100 h 00 min"),
    ],
)
def test_durations(seconds, expected):
    assert duration(seconds) == expected


@pytest.mark.parametrize(
    ("params", "expected"),
    [(15_737_724, "15.7 M"), (842_000, "842 k"), (999, "999"), (109_482_240, "109 M"), (1.3e9, "1.3 G")],
)
def test_parameter_counts(params, expected):
    assert millions(params) == expected


def test_the_partition_tree_is_drawn_where_there_is_one(tmp_path, quick):
    path = write_run(tmp_path / "run", layers=2, hidden=24, trials=45, teacher_layers=4)
    build_report(path)
    assert "How the sampler parted the space" in headings(path)
    tree = json.loads((path / "stage1" / "sampler.json").read_text())["tree"]
    assert tree["visits"] == 45
    good, bad = tree["children"]
    assert good["visits"] + bad["visits"] == 45
    assert good["mean"] > bad["mean"]
    assert {f["name"].partition(".")[0] for f in tree["features"]} <= {"layer0", "layer1", "total"}


def test_operators_are_counted_by_hand():
    texts = [
        ("linear1_1(gelu(linear1_1(x,wb1)),wb2), linear1_1(gelu(linear1_1(x,wb1)),wb2)", 0.9),
        ("tanh(linear1_1(gelu(linear1_1(x,wb1)),wb2)), linear1_1(relu(linear1_1(x,wb1)),wb2)", 0.8),
        *[("linear1_1(relu(linear1_1(x,wb1)),wb2), linear1_1(relu(linear1_1(x,wb1)),wb2)", 0.1)] * 8,
    ]
    trials = [Candidate(n, "complete", score, 1, 1.0, text, "") for n, (text, score) in enumerate(texts)]
    best, everyone, kept = _shares(Stage("1", "Stage 1", trials, 0))
    assert kept == 5
    assert best["gelu"] == pytest.approx([2 / 5, 1 / 5])
    assert best["tanh"] == pytest.approx([1 / 5, 0])
    assert everyone["relu"] == pytest.approx([8 / 10, 9 / 10])


def test_costs_survive_the_table(tmp_path):
    arch = uniform(GELU_FFN, 1, Fraction(1), 2)
    trials = [
        Trial("s", n, arch, str(n), 0.5, 7, 1.0, attrs=a) for n, a in enumerate([{"flops": 12.5, "rungs": {}}, {}])
    ]
    write_candidates(tmp_path / "c.csv", trials)
    assert [c.costs for c in read_candidates(tmp_path / "c.csv")] == [{"flops": 12.5}, {}]


def test_a_drawing_shows_which_parts_of_layers_are_left():
    ffn = "linear1_3/8(gelu(linear1_3/8(x,wb1)),wb2)"
    made = draw_architecture(Architecture.parse(f"{ffn}@3, none, none@0, {ffn}@0"), hidden_size=35)
    words = [text.get_text() for text in made.axes[0].texts]
    assert [words.count(w) for w in ("3 heads", "attention", "3/8", "no FFN", "left out")] == [1, 1, 2, 1, 1]
    draw_architecture(Architecture.parse("none, none"), hidden_size=35)
