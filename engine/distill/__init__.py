"""Distillation: one teacher pass, one or many students.

- `Distiller`: teacher, layer map and objective; the loss of one student or subnet.
- `TeacherTargets`: the teacher's answers for a fixed list of batches, kept.
- `PopulationStep`, `train_population`: K students of their own against the same teacher pass.
- `mixed_states`: K subnets of one supernet in one pass.
"""

from engine.distill.distiller import Distiller
from engine.distill.mixed import mixed_states
from engine.distill.population import Member, Outcome, PopulationStep, train_population
from engine.distill.targets import TeacherTargets, states_bytes

__all__ = [
    "Distiller",
    "Member",
    "Outcome",
    "PopulationStep",
    "TeacherTargets",
    "mixed_states",
    "states_bytes",
    "train_population",
]
