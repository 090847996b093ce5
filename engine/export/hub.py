"""A model directory put on the Hugging Face hub, whole: weights, configuration, Python files, tokenizer, card.

The directory goes up as it lies on the disk, so what was tested here is what others get. Rejected: `push_to_hub` of the
loaded model; it writes the files once more, without the card, and only those that transformers knows of.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from engine.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def require_hub(name: str) -> None:
    """Looks at what can be known before anything is sent.

    Raises:
        UserError: `name` is not USER/NAME, or nobody is logged in.
    """
    from huggingface_hub import get_token

    if _NAME.fullmatch(name) is None:
        raise UserError(f"--push-to-hub: {name!r} is no name on the hub: give USER/NAME")
    if not get_token():
        raise UserError(f"--push-to-hub {name}: no token for the hub: run `hf auth login`, or set HF_TOKEN")


def push_to_hub(folder: str | os.PathLike[str], name: str, *, private: bool = False) -> str:
    """Uploads all files of the model directory `folder` as one commit; returns the address.

    The repository is made where there is none.

    Args:
        folder: the directory.
        name: USER/NAME.
        private: only its owner may see the repository.

    Raises:
        UserError: see `require_hub`; a private upload to a public repository; or the hub refuses or is out of reach.
    """
    require_hub(name)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    api = HfApi(library_name="ffnas")
    try:
        address = str(api.create_repo(name, repo_type="model", private=private or None, exist_ok=True))
        if private and not api.repo_info(name, repo_type="model").private:
            raise UserError(f"--private: {name} is there already and everybody can read it: choose another name")
        api.upload_folder(
            repo_id=name, folder_path=Path(folder), repo_type="model", commit_message="Model found by ffnas"
        )
    except HFValidationError as error:
        raise UserError(f"--push-to-hub: {name!r} is no name on the hub ({_line(error)}): give USER/NAME") from error
    except HfHubHTTPError as error:
        raise UserError(
            f"--push-to-hub {name}: the hub refused ({_line(error)}): check the name and the token's rights"
        ) from error
    except (HTTPError, OSError) as error:
        if getattr(error, "filename", None) is not None:  # a file here, not the hub
            raise
        raise UserError(f"--push-to-hub {name}: the hub is out of reach ({_line(error)}): try again later") from error
    return address


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
