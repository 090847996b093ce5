"""What every part of a run shares, from what it works on to where its results go.

- `prepared`: teacher, data, shape and space, loaded and checked before anything is written (`prepare`).
- `models`: students, distillers, the teacher's answers.
- `run`: the run directory, the ledger, boards and times (`Context`, which has all of it).
"""

from search.context.prepared import Prepared, agree_on, prepare, scored, teacher_cache
from search.context.run import Context

__all__ = ["Context", "Prepared", "agree_on", "prepare", "scored", "teacher_cache"]
