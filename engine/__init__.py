"""ffnas engine: teacher, student and supernet models, distillation, data, training and evaluation.

`import engine` makes `AutoModel*.from_pretrained` and `pipeline` load ffnas models, and is quick: transformers and
torch are imported when first used.
"""

from engine.registration import install as _install

_install()
