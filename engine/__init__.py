"""ffnas engine: teacher, student and supernet models, distillation, data, training and evaluation.

`import engine` makes the kinds of tasks known (`engine.tasks`), and `AutoModel*.from_pretrained` and `pipeline` load
ffnas models. It is quick: transformers and torch are imported when first used.
"""

from engine.registration import install as _install_models
from engine.tasks import install as _install_tasks

_install_tasks()
_install_models()
