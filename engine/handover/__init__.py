"""The model as its users get it: plain PyTorch files that lie beside the weights and need no ffnas.

`configuration_ffnas.py` and `modeling_ffnas.py` here are copied into every exported directory as they are;
`expressions_ffnas.py`, which the second one imports, is generated for the architecture (`engine.handover.generate`).
Neither of the copied files may import anything but torch and transformers, nor be imported from here: `load_plain`
loads them from a directory, as transformers does under `trust_remote_code=True`.

Rejected: one interpreter of expressions, with a parser, in every model directory. Whoever reviews the remote code they
are about to trust reads each layer's formula instead.
"""

from __future__ import annotations

from engine.handover.directory import FILES, auto_map, custom_pipelines, is_named, load_plain, write_files
from engine.handover.known import hand_over

__all__ = ["FILES", "auto_map", "custom_pipelines", "hand_over", "is_named", "load_plain", "write_files"]
