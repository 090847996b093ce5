"""What people type: words stay words, numbers are asked for clearly, other folders, users and pipes do no harm."""

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
from newcomer import REPO, labelled, started, write_table

from engine.data.config import words
from engine.errors import UserError
from engine.teacher.loading import require_language, require_one_label
from kernels.cache import cache_dir, temporary_home
from search.config.options import parse, parse_resolve
from search.console.environment import give_home

sys.path.insert(0, str(REPO / "tests" / "faults"))

from fault_runs import make_inputs, options


def data_of(*arguments):
    return parse(["--data.train", "a.csv", *arguments])[0].data


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("[0,1]", ["0", "1"]),
        ("[no,yes]", ["no", "yes"]),
        ("no, yes", ["no", "yes"]),
        ("-1,0,1", ["-1", "0", "1"]),
        ("['007', 1.0]", ["007", "1.0"]),
        ('["a, b", c]', ["a, b", "c"]),
        ("on,off", ["on", "off"]),
        ("it's,not", ["it's", "not"]),
    ],
)
def test_names_of_classes_are_words(given, names):
    assert data_of("--data.label_names", given).label_names == names
    assert data_of(f"--data.label-names={given}").label_names == names
    assert words(given) == names


@pytest.mark.parametrize("written", ["[no, yes]", "['no', 'yes']", "no,yes"])
def test_names_of_classes_in_a_configuration_file_are_words(tmp_path, written):
    (tmp_path / "my.yaml").write_text(f"data:\n  label_names: {written}\n  label_column: 1\n  text_columns: [on]\n")
    data = data_of("--config", str(tmp_path / "my.yaml"))
    assert (data.label_names, data.label_column, data.text_columns) == (["no", "yes"], "1", ["on"])


def test_columns_named_by_a_number(tmp_path, shown):
    path = write_table(tmp_path / "a.csv", ("0", "1"), labelled(24, ("no", "yes")))
    assert "text: 0; label: 1" in shown(path, "--data.text_columns", "[0]", "--data.label_column", "[1]")


@pytest.mark.parametrize("given", [["--budget.params", "4e6"], ["--budget.params=4000000"]], ids=str)
def test_one_number_of_parameters_asks_for_two(given):
    with pytest.raises(UserError, match=r"budget.params: 4(e6|000000): give two numbers, lowest and highest .*at most"):
        parse(given)
    assert parse(["--budget.params", "0", "4e6"])[0].budget.params == [0.0, 4e6]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.train", "missing.csv"], "missing.csv: no such file"),
        (["--data.train", "{table}", "--teacher", "./missing"], "teacher './missing' not found"),
        (["--data.train", "{table}", "--data.label_column", "lable"], "did you mean 'label'?"),
    ],
    ids=["data", "teacher", "column"],
)
@pytest.mark.parametrize("command", ["search", "derive", "teacher"])
def test_mistakes_in_files_are_told_before_frameworks_load(tmp_path, command, arguments, words):
    table = write_table(tmp_path / "a.csv", ("text", "label"), labelled(40, ("no", "yes")))
    given = [a.format(table=table) for a in arguments]
    if command == "derive":
        given += ["--preset", "efficientbert-tiny", "--settings", "demo"]
    code = (
        "import sys; from search.cli import main; code = main(sys.argv[1:]);"
        "print(code, sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = started(command, *given, code=code)
    assert done.stdout.strip() == "2 []", done.stderr
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_closed_pipe_ends_the_command_without_a_word():
    command = f"{sys.executable} -m search.cli presets | head -1; echo ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(REPO), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    header, code = done.stdout.splitlines()
    assert header.startswith("name ")
    assert code in ("0", "141")  # 0: all was written before `head` ended


def test_output_to_a_reader_that_has_ended():
    """Certainly: the other end is closed before the command starts."""
    code = (
        "import os, sys; from search.cli import main\n"
        "read, write = os.pipe(); os.close(read); os.dup2(write, 1); sys.exit(main(['presets']))"
    )
    done = started(code=code)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """This process is a user without a home directory, a name, or an entry among the users; temporary files go into
    `tmp_path`."""

    def unknown(_uid):
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME", "FFNAS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    temporary_home.cache_clear()
    yield
    temporary_home.cache_clear()


def test_caches_of_a_user_without_home_are_in_a_folder_of_their_own(nobody, tmp_path):
    place = tmp_path / f"ffnas-home-{os.getuid()}"
    assert cache_dir() == place / ".cache" / "ffnas"
    assert place.stat().st_mode & 0o777 == 0o700


def test_no_cache_in_a_temporary_folder_somebody_else_may_write(nobody, tmp_path, monkeypatch):
    """A link under the name ours would have, to where anything may lie."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"ffnas-home-{os.getuid()}").symlink_to(tmp_path / "theirs")
    found = cache_dir()
    assert found.parents[1].parent == tmp_path
    assert tmp_path / "theirs" not in found.resolve().parents
    assert cache_dir() == found  # one for the process


def test_a_user_without_home_and_name(nobody, tmp_path):
    note = give_home()
    place = Path(os.environ["HOME"])
    assert place.parent == tmp_path
    assert place.stat().st_mode & 0o777 == 0o700
    assert str(place) in note
    assert os.environ["USER"] == f"user{os.getuid()}"
    assert give_home() is None  # found the second time


def test_a_home_that_is_there_is_left_alone(tmp_path):
    environment = {"HOME": str(tmp_path), "USER": "ann"}
    before = dict(environment)
    os.environ["HOME"], kept = str(tmp_path), os.environ.get("HOME")
    try:
        assert give_home(environment) is None
    finally:
        os.environ["HOME"] = kept or ""
    assert environment == before


def test_a_container_user_without_entry_gets_an_answer(tmp_path):
    """A process of its own whose number nobody has: everything a command imports has to do without."""
    code = (
        "import getpass, os, pwd\n"
        "def nobody(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = nobody\n"
        "from search.cli import main; code = main(['presets'])\n"
        "import torch._inductor.runtime.cache_dir_utils as caches; from kernels.cache import cache_dir\n"
        "print(code, cache_dir(), caches.default_cache_dir(), getpass.getuser())"
    )
    kept = {
        k: v for k, v in os.environ.items() if k not in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "FFNAS_CACHE")
    }
    environment = {**kept, "PYTHONPATH": str(REPO), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    home, user = tmp_path / f"ffnas-home-{os.getuid()}", f"user{os.getuid()}"
    last = done.stdout.splitlines()[-1]
    assert last == f"0 {home}/.cache/ffnas {tmp_path}/torchinductor_{user} {user}"
    assert done.stderr.startswith("ffnas: no home directory: caches go to")


class _Config:
    def __init__(self, **values):
        self.model_type = "bert"
        self.__dict__.update(values)


def test_a_teacher_of_several_labels_is_refused():
    with pytest.raises(UserError, match=r"teacher 'm': .*says multi_label_classification, which is not served"):
        require_one_label(_Config(problem_type="multi_label_classification"), "m")
    require_one_label(_Config(problem_type="single_label_classification"), "m")


def test_xmod_without_a_default_language_is_refused():
    config = _Config(model_type="xmod", default_language=None, languages=["en_XX", "de_DE"])
    with pytest.raises(UserError, match=r"names no default_language.*to one of en_XX, de_DE"):
        require_language(config, "m")
    config.default_language = "de_DE"
    require_language(config, "m")


# -- with a model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("firstuse")
    make_inputs(folder)
    return folder


def test_predict_takes_the_reading_options_it_recommends(inputs, tmp_path, capsys):
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    from search.cli import main

    model, tokenizer = tmp_path / "model", AutoTokenizer.from_pretrained(inputs / "teacher")
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, id2label={0: "no", 1: "yes"},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    (tmp_path / "a.csv").write_bytes('words^id\n"it was caf\xe9^1\nthe phone^2\n'.encode("latin-1"))
    command = ["predict", str(model), "--data", str(tmp_path / "a.csv"), "--out", str(tmp_path / "o.tsv")]
    command += ["--device", "cpu"]
    given: list[str] = []
    for problem, remedy in (
        ("--data.encoding", "latin-1"),
        ("--data.quoting", "none"),
        ("--data.text_columns", "words"),
    ):
        assert main([*command, "--data.delimiter", "^", *given]) == 2
        assert problem in capsys.readouterr().err
        given += [problem, remedy]
    assert main([*command, "--data.delimiter", "^", *given]) == 0
    assert [line.split("\t")[0] for line in (tmp_path / "o.tsv").read_text().splitlines()] == ["id", "1", "2"]


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows(inputs, tmp_path, refused):
    import shutil

    from transformers import AutoTokenizer

    shutil.copytree(inputs / "teacher", tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    tokenizer.add_tokens(["[TAG]"])
    tokenizer.save_pretrained(tmp_path / "teacher")
    rows = len(tokenizer) - 1
    arguments = [*options(inputs, tmp_path / "runs", "run"), "--teacher", str(tmp_path / "teacher")]
    message = refused(*arguments, command="search")
    assert f"its tokenizer knows {rows + 1} tokens, the model {rows}: put the tokenizer" in message


def test_a_run_shows_its_data_and_goes_on_from_another_folder(inputs, tmp_path, capsys, monkeypatch):
    from search.cli import main

    monkeypatch.setenv("FFNAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(inputs)
    relative = [word.replace(f"{inputs}/", "") for word in options(inputs, tmp_path / "runs", "run")]
    assert "train.csv" in relative
    assert main(["search", *relative, "--data.label_names", "[bad,good]", "--files", "all"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("data    train train.csv: 240 rows (CSV); text: sentence; label: label\n")
    assert out.index("length  median") < out.index("run directory:") < out.index("teacher")
    monkeypatch.chdir(tmp_path)
    assert main(["search", "--resume", str(tmp_path / "runs" / "run")]) == 0
    assert "has finished, nothing is left to do" in capsys.readouterr().out
    (tmp_path / "runs" / "run" / "summary.json").unlink()  # as if the last step had been interrupted
    assert main(["search", "--resume", str(tmp_path / "runs" / "run")]) == 0
    again = capsys.readouterr().out
    assert f"train {inputs / 'train.csv'}: 240 rows" in again
    _, config = parse_resolve(["--resolve", str(tmp_path / "runs" / "run"), "--budget.params", "0", "1e6"])
    assert (config.data.train, config.teacher) == (str(inputs / "train.csv"), str(inputs / "teacher"))


@pytest.mark.parametrize("text", ["ffnas: threads wait (said once)", "ffnas threads wait (said once)"])
def test_warnings_of_ours_say_ffnas_once(text, capsys):
    from kernels.backends.cpu import CrowdedWarning
    from search.cli import _show

    _show(lambda *_: None, CrowdedWarning(text), CrowdedWarning, "file.py", 3)
    assert capsys.readouterr().err == "ffnas: threads wait (said once)\n"
