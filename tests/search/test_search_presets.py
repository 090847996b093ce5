"""Every preset is a whole configuration of its own, and says which it is."""

from __future__ import annotations

import pytest

from search.config.options import parse, preset_names


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("strategy", [None, "inherit", "paper"])
def test_a_preset_is_complete_for_every_strategy(name, strategy):
    config, _ = parse(["--preset", name, *(["--strategy", strategy] if strategy else [])])
    assert config.preset == name
    assert strategy in (None, config.strategy)


def test_there_are_presets_for_small_and_large_machines():
    assert {"demo", "hour", "gpu", "paper", "smoke"} <= set(preset_names())
