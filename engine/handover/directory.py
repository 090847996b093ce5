"""Puts the plain modeling files into a model directory, and loads a model from them.

Loading goes through a package made of the directory itself, as transformers' dynamic modules do, but without copying
it into the user's cache and without the hub: for our own checks, ONNX and `torch.export`.
"""

from __future__ import annotations

import importlib
import itertools
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from engine.handover.generate import expressions_source
from engine.handover.known import HandOver, hand_over, hand_overs

COPIED = ("configuration_ffnas.py", "pooling_ffnas.py", "modeling_ffnas.py")
GENERATED = "expressions_ffnas.py"
FILES = (*COPIED, GENERATED)
_CONFIG = "configuration_ffnas.FFNASConfig"
_numbers = itertools.count()


def auto_map(model_class: str) -> dict[str, str]:
    """`auto_map` of config.json: where transformers finds the classes under `trust_remote_code=True`; of classes with a
    file of their own only that of the model, since others' files are not written."""
    there = {name: known for name, known in hand_overs().items() if known.plain is None or name == model_class}
    places = {known.auto: f"{_module(known)}.{name}" for name, known in there.items()}
    return {"AutoConfig": _CONFIG, **places}


def custom_pipelines(model_class: str) -> dict[str, Any]:
    """`custom_pipelines` of config.json: pipelines in the directory that some versions of transformers lack."""
    known = hand_over(model_class)
    if known.own_pipeline is None:
        return {}
    name, file = known.own_pipeline
    return {known.tag: {"impl": f"{file.stem}.{name}", "pt": [known.auto]}}


def is_named(found: Any) -> bool:
    """Whether an `auto_map` names this package's files, in the directory or in a repository ("REPO--MODULE.NAME")."""
    if not isinstance(found, dict):
        return False
    return str(found.get("AutoConfig")).rpartition("--")[2] == _CONFIG


def write_files(config: Any, model_class: str, folder: str | os.PathLike[str]) -> None:
    """Writes the modeling files for the architecture `config` stores, and the pipeline `model_class` needs.

    Args:
        config: an `FFNASConfig`.
        model_class: name of the model's class.
        folder: an existing directory.

    Raises:
        UserError: an operator of it cannot be written as plain PyTorch code.
    """
    source = expressions_source(
        config.full_architecture, config.hidden_size, config.intermediate_size, config.width_policy
    )
    known = hand_over(model_class)
    own = [known.plain, None if known.own_pipeline is None else known.own_pipeline[1]]
    for file in (*(Path(__file__).with_name(name) for name in COPIED), *(file for file in own if file is not None)):
        shutil.copyfile(file, Path(folder) / file.name)
    (Path(folder) / GENERATED).write_text(source, encoding="utf-8")


def _module(known: HandOver) -> str:
    """The module of a directory that holds the plain class."""
    return "modeling_ffnas" if known.plain is None else known.plain.stem


def load_plain(folder: str | os.PathLike[str]) -> nn.Module:
    """The model of an exported directory, run by the directory's own files alone, in eval mode.

    Only for directories this program wrote: their code runs.
    """
    folder = Path(folder).resolve()
    package = ModuleType(f"_ffnas_handover_{next(_numbers)}")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    configuration = importlib.import_module(f"{package.__name__}.configuration_ffnas")
    config = configuration.FFNASConfig.from_pretrained(folder)
    module = _module(hand_over(config.architectures[0]))
    modeling = importlib.import_module(f"{package.__name__}.{module}")
    return getattr(modeling, config.architectures[0]).from_pretrained(folder, config=config).eval()
