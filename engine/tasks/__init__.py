"""The kinds of tasks, a file each; see `engine.data.task.TaskHead` for what a kind is and how to add one.

`import engine` makes them known, and loads no framework.
"""

from engine.data.task import register
from engine.tasks.classification import Classification
from engine.tasks.multiple_choice import MultipleChoice
from engine.tasks.question_answering import QuestionAnswering
from engine.tasks.regression import Regression


def install() -> None:
    """Makes them known."""
    for head in (Classification(), Regression(), QuestionAnswering(), MultipleChoice()):
        register(head)
