"""Teachers: found, loaded, watched, fine-tuned on the task and cached."""

from engine.teacher.adapter import Teacher
from engine.teacher.sources import TeacherSource, resolve

__all__ = ["Teacher", "TeacherSource", "resolve"]
