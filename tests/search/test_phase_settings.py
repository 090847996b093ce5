"""What `validate` says about micro-batches and the cache of teacher's answers."""

import pytest

from engine.errors import UserError
from search.config.options import parse


def refused(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(["--preset", "smoke", *arguments])
    return str(caught.value)


def test_micro_batches_belong_to_the_phases_of_supernets_and_the_found_model():
    config, _ = parse(["--preset", "smoke", "--warmup.accumulate", "4", "--derive.task.accumulate", "16"])
    assert (config.warmup.accumulate, config.derive.task.accumulate, config.stage3.text.accumulate) == (4, 16, 1)
    assert "warmup.accumulate: 17 parts of 16 sequences" in refused("--warmup.accumulate", "17")
    assert "warmup.accumulate: 0 is out of range" in refused("--warmup.accumulate", "0")
    assert "stage1.task.accumulate: candidates are trained on whole" in refused("--stage1.task.accumulate", "2")


def test_teacher_answers_stay_in_memory_unless_told_otherwise():
    config, _ = parse(["--preset", "smoke"])
    assert (config.targets.cache, config.targets.dtype, config.targets.folder) == ("memory", "exact", None)
    config, _ = parse(["--preset", "smoke", "--targets.cache", "disk", "--targets.dtype", "bf16"])
    assert (config.targets.cache, config.targets.dtype) == ("disk", "bf16")
    assert "targets.cache: 'cloud' is not known" in refused("--targets.cache", "cloud")
    assert "targets.dtype: 'fp8' is not known" in refused("--targets.dtype", "fp8")
