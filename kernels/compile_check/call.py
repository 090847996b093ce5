"""One call whose kernels are compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Call:
    """A call whose kernels are compiled.

    Attributes:
        name: how the table calls its kernels; the first word is the tier.
        function, arguments: `function(*arguments)`, a module's function and hashable data, makes it over meta tensors.
    """

    name: str
    function: Callable[..., None]
    arguments: tuple[object, ...]

    def run(self) -> None:
        self.function(*self.arguments)
