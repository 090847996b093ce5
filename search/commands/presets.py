"""`ffnas presets`: the models known by name, with their parameters, FLOPs and distillation recipes."""

from __future__ import annotations

import json
from typing import Any

from engine.architecture.file import save_architecture
from engine.architecture.flops import PAPER_LENGTH
from engine.errors import UserError
from engine.published.presets import PRESETS, ModelPreset, get_preset
from search.console.arguments import QuietParser

CONVENTIONS = (
    "encoder: embeddings and encoder. + fit_dense: as the paper counts. deployed: with pooler and a classifier of two"
    " classes. FLOPs: 2 per multiply-accumulate, matrix products of embeddings and encoder, one sequence of {length}"
    " tokens, without fit_dense, pooler and classifier."
)


def command(argv: list[str]) -> None:
    """Prints the table, one preset in full, or JSON; writes an architecture file with `--save`.

    Raises:
        UserError: an unknown preset or a wrong option.
    """
    parser = QuietParser(prog="ffnas presets", description="Models by name.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="show these in full (default: a table of all)")
    parser.add_argument("--length", type=int, default=PAPER_LENGTH, help="sequence length of the FLOPs (default 128)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", metavar="FILE", help="write the architecture file of the one preset named")
    options = parser.parse_args(argv)
    presets = [get_preset(name) for name in options.names]
    if options.save is not None:
        _save(presets, options.save)
        return
    if options.json:
        print(json.dumps([as_dict(p, options.length) for p in presets or PRESETS.values()], indent=2))
    elif presets:
        print("\n\n".join(_full(preset, options.length) for preset in presets))
    else:
        print(_table(options.length))


def as_dict(preset: ModelPreset, length: int = PAPER_LENGTH) -> dict[str, Any]:
    """Everything a preset says, as JSON-able data."""
    counts, shape, recipe = preset.counts(length), preset.shape, preset.recipe
    return {
        "name": preset.name,
        "about": preset.about,
        "family": preset.family,
        "hidden_size": shape.hidden_size,
        "num_layers": shape.num_layers,
        "heads": preset.heads,
        "ffn_size": shape.ffn_size,
        "embedding": "full" if shape.embedding_size is None else f"trigram {shape.embedding_size}",
        "policy": preset.policy,
        "architecture": None if preset.architecture is None else str(preset.architecture),
        "params": {
            "encoder": counts.encoder,
            "fit_dense": counts.fit_dense,
            "pooler": counts.pooler,
            "classifier": counts.head,
            "with_fit_dense": counts.paper,
            "deployed": counts.deployed,
            "published_millions": preset.published,
        },
        "flops": {"length": length, "value": counts.flops},
        "recipe": {
            "start": recipe.start,
            "text": {k: getattr(recipe.text, k) for k in ("epochs", "batch_size", "lr")},
            "task": {k: getattr(recipe.task, k) for k in ("epochs", "batch_size", "lr")},
            "cola_epochs": recipe.cola_epochs,
            "squad_lr": recipe.squad_lr,
        },
    }


def _table(length: int) -> str:
    rows = [("name", "L", "H", "F", "heads", "encoder", "+ fit_dense", "deployed", f"FLOPs at {length}", "")]
    for preset in PRESETS.values():
        counts, shape = preset.counts(length), preset.shape
        rows.append(
            (
                preset.name,
                str(shape.num_layers),
                str(shape.hidden_size),
                str(shape.ffn_size),
                str(preset.heads),
                f"{counts.encoder:,}",
                f"{counts.paper:,}",
                f"{counts.deployed:,}",
                f"{counts.flops / 1e9:.2f} G",
                preset.about,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i in (0, 9) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, "", CONVENTIONS.format(length=length)])


def _full(preset: ModelPreset, length: int) -> str:
    data = as_dict(preset, length)
    params, recipe = data["params"], data["recipe"]
    lines = [
        f"{preset.name}: {preset.about}",
        f"  sizes       L {data['num_layers']}, H {data['hidden_size']}, F {data['ffn_size']}, {data['heads']} heads,"
        f" embedding {data['embedding']}, width policy {data['policy']}",
        f"  parameters  encoder {params['encoder']:,}; fit_dense {params['fit_dense']:,}; pooler {params['pooler']:,};"
        f" classifier of two {params['classifier']:,}",
        f"              with fit_dense {params['with_fit_dense']:,}; deployed {params['deployed']:,};"
        f" in print {params['published_millions']} M",
        f"  FLOPs       {data['flops']['value'] / 1e9:.3f} G per sequence of {length} tokens",
    ]
    if preset.architecture is not None:
        lines += ["  layers", *(f"    {text}" for text in preset.architecture.texts())]
        start = {"warmup": "text-distilled supernet", "supernet": "multi-task supernet"}[recipe["start"]]
        text, task = recipe["text"], recipe["task"]
        lines += [
            f"  recipe      starts from: {start}",
            f"              text {text['epochs']} epochs, batch {text['batch_size']}, lr {text['lr']:g}",
            f"              task {task['epochs']} epochs (CoLA {recipe['cola_epochs']:g}), batch {task['batch_size']},"
            f" lr {task['lr']:g} (SQuAD {recipe['squad_lr']:g})",
        ]
    return "\n".join(lines)


def _save(presets: list[ModelPreset], path: str) -> None:
    if len(presets) != 1 or presets[0].architecture is None:
        raise UserError("--save: name exactly one preset that is an FFNAS student: `presets efficientbert --save F`")
    save_architecture(presets[0].architecture, path, presets[0].shape)
