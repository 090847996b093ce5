"""Presets: counts as published, formulas equal to the models built, recipes as the paper states them."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BertModel, MobileBertModel

from engine.errors import UserError
from engine.published.build import build_preset, transformers_config
from engine.published.presets import PRESETS, get_preset
from engine.student import FFNASConfig, FFNASModel
from search.cli import main

WITH_FIT_DENSE = {
    "efficientbert": 15_737_724,
    "efficientbert-tiny": 9_375_144,
    "efficientbert-plus": 15_737_724,
    "efficientbert-plusplus": 14_241_864,
    "tinybert6-transfer": 70_116_608,
}
GIGAFLOPS = {
    "bert-base": 22.35,
    "tinybert6": 11.17,
    "tinybert4": 1.25,
    "efficientbert": 3.05,
    "efficientbert-tiny": 1.42,
    "efficientbert-plusplus": 2.80,
}


@pytest.mark.parametrize("name", WITH_FIT_DENSE)
def test_parameters_are_the_published_ones(name):
    assert PRESETS[name].counts().paper == WITH_FIT_DENSE[name]


@pytest.mark.parametrize("name", GIGAFLOPS)
def test_flops_are_the_published_ones(name):
    assert PRESETS[name].counts(128).flops / 1e9 == pytest.approx(GIGAFLOPS[name], rel=0.005)  # published to 3 digits


@pytest.mark.parametrize("name", PRESETS)
def test_formulas_count_the_models(name):
    """Against the modules themselves: transformers' for the baselines, ours for the students."""
    preset = PRESETS[name]
    counts = preset.counts()
    classes = {"ffnas": FFNASModel, "bert": BertModel, "mobilebert": MobileBertModel}
    with torch.device("meta"):
        bare = classes[preset.family](transformers_config(preset), add_pooling_layer=False)
        assert sum(p.numel() for p in bare.parameters()) == counts.encoder
        if preset.architecture is not None:
            teacher = preset.shape.teacher_hidden_size
            student = FFNASModel(FFNASConfig(**preset.student_config(teacher_hidden_size=teacher)))
            assert sum(p.numel() for p in student.parameters()) == counts.paper + counts.pooler
        whole = build_preset(preset)
        assert sum(p.numel() for p in whole.parameters()) == counts.deployed


def test_recipes_follow_the_task():
    recipe = get_preset("efficientbert").recipe
    assert (recipe.text.epochs, recipe.task.epochs, recipe.task.batch_size, recipe.task.lr) == (10, 10, 32, 5e-5)
    assert recipe.task_phase("nyu-mll/glue:CoLA@train").epochs == 50
    assert recipe.task_phase("squad_v2").lr == 1e-4
    assert recipe.task_phase("sst2") == recipe.task
    assert get_preset("efficientbert-plus").recipe.start == "supernet"
    assert recipe.start == "warmup"


def test_wrong_names_and_uses_are_refused():
    with pytest.raises(UserError, match="'bert' is not known: choose one of efficientbert"):
        get_preset("bert")
    with pytest.raises(UserError, match="mobilebert-tiny is no FFNAS student"):
        get_preset("mobilebert-tiny").student_config()
    with pytest.raises(UserError, match="length"):
        get_preset("mobilebert-tiny").counts(0)


def test_the_command_lists_and_saves(capsys, tmp_path):
    assert main(["presets"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in PRESETS)
    assert "15,737,724" in table
    assert main(["presets", "efficientbert-tiny", "--json", "--length", "384"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["params"]["with_fit_dense"] == 9_375_144
    assert entry["flops"] == {"length": 384, "value": PRESETS["efficientbert-tiny"].counts(384).flops}
    assert main(["presets", "efficientbert", "--save", str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["params"] == 15_737_724
    assert main(["presets", "mobilebert-tiny", "--save", str(tmp_path / "b.json")]) == 2
    assert "exactly one preset" in capsys.readouterr().err
    assert main(["presets", "--nix"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
