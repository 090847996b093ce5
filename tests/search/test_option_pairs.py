"""Of two values of which one is enough, the one a user gives unsets the preset's other one; everywhere."""

from __future__ import annotations

import dataclasses

import yaml

from search.config.options import parse
from search.config.pairs import partners
from search.config.schema import SearchConfig

PHASES = [f"{stage}.{kind}" for stage in ("stage1", "stage2", "stage3", "derive") for kind in ("text", "task")]
PHASES.append("warmup")


def at(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return config


def config_of(tmp_path, values, *arguments, preset="smoke"):
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(values))
    return parse(["--preset", preset, "--config", str(path), *arguments])[0]


def nested(name, values):
    for part in reversed(name.split(".")):
        values = {part: values}
    return values


def test_every_pair_of_the_configuration_is_known():
    assert set(partners()) == {f"{p}.{k}" for p in PHASES for k in ("steps", "epochs")} | {
        "finetune.max_steps",
        "finetune.epochs",
        "data.task",
        "data.train",
    }
    for name, partner in partners().items():
        assert partners()[partner.name].name == name
        assert at(SearchConfig(), name) is None


def test_phases(tmp_path):
    config, _ = parse(["--preset", "smoke", *(f"--{phase}.epochs={n}" for n, phase in enumerate(PHASES, 1))])
    for n, phase in enumerate(PHASES, 1):
        assert (at(config, phase).epochs, at(config, phase).steps) == (n, None)
    config, _ = parse(["--preset", "paper", *(word for phase in PHASES for word in (f"--{phase}.steps", "7"))])
    assert {(at(config, phase).epochs, at(config, phase).steps) for phase in PHASES} == {(None, 7)}
    config = config_of(tmp_path, {"warmup": {"epochs": 3}, "stage1": {"text": {"epochs": 2.5}}})
    assert (config.stage1.text.epochs, config.stage1.text.steps) == (2.5, None)
    assert (config.warmup.epochs, config.warmup.steps) == (3, None)
    others = [at(config, other) for other in PHASES if other not in ("warmup", "stage1.text")]
    assert all(settings.steps is not None and settings.epochs is None for settings in others)


def test_fine_tuning(tmp_path):
    assert parse(["--preset", "smoke"])[0].finetune.max_steps == 8
    config, _ = parse(["--preset", "smoke", "--finetune.epochs", "2"])
    assert (config.finetune.epochs, config.finetune.max_steps) == (2, None)
    config, _ = parse(["--preset", "paper", "--finetune.max-steps", "30"])
    assert (config.finetune.epochs, config.finetune.max_steps) == (None, 30)
    config, _ = parse(["--preset", "smoke", "--finetune.epochs", "2", "--finetune.max_steps", "30"])
    assert (config.finetune.epochs, config.finetune.max_steps) == (2, 30)  # the smaller one counts
    config = config_of(tmp_path, {"finetune": {"epochs": 2}})
    assert (config.finetune.epochs, config.finetune.max_steps) == (2, None)


def test_the_command_line_wins_over_a_file_and_a_file_that_says_both_stays(tmp_path):
    config = config_of(tmp_path, {"finetune": {"epochs": 2}}, "--finetune.max_steps", "5")
    assert (config.finetune.epochs, config.finetune.max_steps) == (None, 5)
    config = config_of(tmp_path, {"warmup": {"steps": 3}}, "--warmup.epochs", "1")
    assert (config.warmup.epochs, config.warmup.steps) == (1, None)
    both = {"finetune": {"epochs": 2, "max_steps": 9}, "warmup": {"steps": None, "epochs": 1}}
    config = config_of(tmp_path, both)
    assert (config.finetune.epochs, config.finetune.max_steps) == (2, 9)
    assert (config.warmup.epochs, config.warmup.steps) == (1, None)


def test_a_value_left_out_or_null_unsets_nothing(tmp_path):
    config = config_of(tmp_path, {"finetune": {"epochs": None, "lr": 1e-3}, "warmup": {}})
    assert (config.finetune.max_steps, config.finetune.lr) == (8, 1e-3)
    assert config.warmup.steps is not None


def test_a_whole_configuration_read_back_is_the_same(tmp_path):
    config, _ = parse(["--preset", "smoke", "--finetune.epochs", "2", "--derive.task.epochs", "1"])
    again = config_of(tmp_path, dataclasses.asdict(config), preset="paper")
    assert dataclasses.asdict(again) == dataclasses.asdict(config)


def test_of_two_that_exclude_one_another_the_last_counts():
    config, _ = parse(["--preset", "smoke", "--warmup.steps", "3", "--warmup.epochs", "1"])
    assert (config.warmup.epochs, config.warmup.steps) == (1, None)
