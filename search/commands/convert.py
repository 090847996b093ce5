"""`ffnas convert`: EfficientBERT's published checkpoints to Hugging Face directories, and back.

ffnas convert best.bin out --preset efficientbert --labels negative,positive --tokenizer DIR
ffnas convert --back out best.bin
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from engine.architecture.file import load_architecture, names_file
from engine.errors import UserError
from search.console.arguments import QuietParser

LICENSE = "apache-2.0"


def command(argv: list[str]) -> None:
    """Converts one file or directory.

    Raises:
        UserError: wrong options, or the checkpoint does not fit the architecture (see `engine.published.convert`).
    """
    options = _parser().parse_args(argv)
    target = Path(options.target)
    if target.exists() and not options.overwrite:
        raise UserError(f"{target}: exists: choose another place, or give --overwrite")
    if options.back:
        _back(options, target)
    else:
        _forth(options, target)


def _parser() -> argparse.ArgumentParser:
    parser = QuietParser(
        prog="ffnas convert",
        description="Published EfficientBERT checkpoint (a pickle with state_dict) to a Hugging Face directory.",
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="published file; with --back a model directory")
    add("target", metavar="TARGET", help="model directory; with --back a file")
    add("--preset", help="sizes and architecture of a preset (`ffnas presets`)")
    add("--architecture", help="architecture file, or text such as 'linear4_2(gelu(linear4_2(x,wb1)),wb2), ...'")
    add("--heads", type=int, help="attention heads (default: the preset's, else 12)")
    add("--ffn-size", type=int, help="FFN width at ratio 1 (default: the preset's, else the hidden size)")
    add("--layer-norm-eps", type=float, help="epsilon of LayerNorm (default: 1e-5, that of the published code)")
    add("--policy", choices=("truncate", "pad"), help="width policy (default: the preset's, else truncate)")
    kinds = ("classification", "question-answering", "multiple-choice", "encoder")
    add("--kind", choices=kinds, help="default: the task's, or by what the file has")
    add("--task", help="published task (mnli, sst-2, squad2.0, ...): names the classes in the published order and takes"
        " its head of several; also T of classifiers.T; with --back, the name to write")  # fmt: skip
    add("--labels", help="names of the classes in the classifier's order, comma separated (default: the task's)")
    add("--regression", action="store_true", help="the classifier gives a value")
    add("--tokenizer", help="directory of the tokenizer to put beside the model")
    add("--supernet", action="store_true", help="keep a supernet whole, to start `ffnas derive` from")
    add("--drop", action="append", default=[], metavar="PREFIX", help="leave out names that begin so (repeatable)")
    add("--no-fit-dense", action="store_true", help="leave out the distillation projection")
    add("--back", action="store_true", help="model directory to published file")
    add("--module", action="store_true", help="with --back: names with `module.` in front")
    add("--sliced", action="store_true", help="with --back: FFNs as small as they are, which the published code cannot"
        " load (default: at full size, zero-filled)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace TARGET if it exists")
    return parser


def _forth(options: argparse.Namespace, target: Path) -> None:
    from engine.architecture.architecture import Architecture
    from engine.export.export import export_model
    from engine.published.convert import from_published, require_sizes
    from engine.published.files import read_published
    from engine.published.presets import get_preset
    from search.console.libraries import quiet
    from search.report.card import architecture_png

    if (options.preset is None) == (options.architecture is None):
        raise UserError("give exactly one of --preset and --architecture")
    preset = None if options.preset is None else get_preset(options.preset)
    if preset is None:
        given = options.architecture
        architecture = load_architecture(given) if names_file(given) else Architecture.parse(given)
    elif preset.architecture is None or preset.family != "ffnas":
        raise UserError(f"--preset: {preset.name} has no checkpoints of this format: choose one of EfficientBERT's")
    else:
        architecture = preset.architecture
    quiet()
    tokenizer = None if options.tokenizer is None else _tokenizer(options.tokenizer)
    tensors = read_published(options.source)
    if preset is not None:
        require_sizes(tensors, preset, options.ffn_size)
    converted = from_published(
        tensors,
        architecture,
        heads=options.heads or (preset.heads if preset else 12),
        ffn_size=options.ffn_size or (preset.shape.ffn_size if preset else None),
        policy=options.policy or (preset.policy if preset else "truncate"),
        kind=options.kind,
        task=options.task,
        stored=options.supernet,
        drop=options.drop,
        **_labels(options),
        **({} if options.layer_norm_eps is None else {"layer_norm_eps": options.layer_norm_eps}),
    )
    card: dict[str, Any] = {
        "name": preset.name if preset else target.name,
        "license": LICENSE,
        "task": options.task,
        "converted from": Path(options.source).name,
    }
    keep = not options.no_fit_dense and converted.model.config.teacher_hidden_size is not None
    drawing = architecture_png(converted.model.config)
    export_model(
        converted.model, tokenizer, target, None, card, architecture_file=True, fit_dense=keep, drawing=drawing
    )
    for note in converted.notes:
        print(f"ffnas: {note}")
    print(f"model: {target} ({type(converted.model).__name__}, {converted.model.num_parameters():,} parameters)")


def _labels(options: argparse.Namespace) -> dict[str, Any]:
    if options.regression:
        if options.labels:
            raise UserError("--labels: a regression has no classes: leave out one of --labels and --regression")
        return {"problem_type": "regression"}
    if options.labels is None:
        return {}
    names = [name.strip() for name in options.labels.split(",")]
    if len(set(names)) != len(names) or not all(names):
        raise UserError(f"--labels: {options.labels!r} is not a list of different names: write a,b,c")
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(f"--tokenizer: {folder!r} holds no tokenizer ({reason:.120}): give its directory") from error


def _back(options: argparse.Namespace, target: Path) -> None:
    from engine.export.saved import load_saved
    from engine.published.back import differences, to_published
    from engine.published.files import write_published
    from search.console.libraries import quiet

    quiet()
    model = load_saved(options.source)
    state = to_published(model, task=options.task, module=options.module, full=not options.sliced)
    write_published(state, target)
    form = "full size, zero beyond the architecture's slices, as the published code loads it"
    if options.sliced:
        form = "sliced to the architecture; the published code cannot load it"
    for line in differences(model):
        print(f"ffnas: {line}")
    print(f"checkpoint: {target} ({len(state)} tensors; {form})")
