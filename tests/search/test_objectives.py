"""Objectives beside the score: options, and NSGA-II over the costs it is given."""

import numpy as np
import pytest

from engine.architecture.shape import ModelShape
from engine.data import TaskSpec
from engine.data.task import head_of
from engine.errors import UserError
from search.config.options import parse
from search.context import scored
from search.ledger.ledger import Trial
from search.samplers import make_sampler
from search.space import SearchSpace
from search.space.costs import Costs


def test_objectives_are_a_list_and_bring_their_sampler():
    config, _ = parse(["--objectives", "score,latency,flops", "--budget.latency-ms", "8", "--budget.flops=3e9"])
    assert config.objectives.names == ["score", "latency", "flops"]
    assert config.sampler.name == "nsga2"
    assert (config.budget.latency_ms, config.budget.flops) == (8.0, 3e9)
    assert parse(["--objectives", "score"])[0].sampler.name != "nsga2"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--objectives", "score,speed"], "objectives.names: 'speed' is not known"),
        (["--objectives", "latency"], "give score"),
        (["--objectives", "score,latency", "--sampler.name", "random"], "use --sampler.name nsga2"),
        (["--budget.memory-mb", "0"], "budget.memory_mb: 0.0 is out of range"),
        (
            ["--objectives.score", "loss"],
            "objectives.score: 'loss' is not known: choose one of metric, neg_log_loss",
        ),
        (["--objectives.score", "neg_log_loss", "--stage3.race", "4"], "stage3.race: 4: a race counts right answers"),
        (["--objectives.threads", "0"], "objectives.threads: 0 is out of range"),
    ],
)
def test_wrong_objectives_are_named(arguments, match):
    with pytest.raises(UserError, match=match):
        parse(arguments)


@pytest.mark.parametrize("kind", ["regression", "question_answering"])
def test_a_task_without_classes_has_no_likelihood(kind):
    spec = TaskSpec("toy", kind, ("a", "b"), "label", metric=head_of(kind).metrics[0])
    config, _ = parse(["--objectives.score", "neg_log_loss"])
    with pytest.raises(UserError, match=f"objectives.score: 'neg_log_loss' is none of a {kind} task: use metric"):
        scored(spec, config)
    for arguments in ([], ["--objectives.score", "smooth"]):
        assert scored(spec, parse(arguments)[0]) is spec


def test_smooth_is_the_likelihood_where_there_are_classes():
    spec = TaskSpec("toy", "classification", ("a", "b"), "label", ("yes", "no"), "f1")
    config, _ = parse(["--objectives.score", "smooth"])
    assert scored(spec, config).metric == "neg_log_loss"
    assert scored(spec, parse([])[0]) is spec


def test_nsga2_finds_the_front_of_score_against_the_cost_it_is_given():
    """The score grows with FLOPs, so every architecture is on the front; against a cost that falls with them, only the
    best one is. The first must spread over costs, the second must not."""
    shape = ModelShape(24, 4, 24, vocab_size=50, embedding_size=8)
    space, costs = SearchSpace(shape, budget=(0, 1e9)), Costs(shape, sequence_length=8)

    def late_flops(cost):
        sampler = make_sampler("nsga2", space, 0, population=20, costs=[cost])
        found = []
        for number in range(110):
            (arch,) = sampler.propose()
            flops = costs.cost("flops", arch)
            sampler.observe([Trial("s", number, arch, space.key(arch), flops, 1, 0.0)])
            found.append(flops)
        return np.array(found[50:])

    front = late_flops(costs.objectives(["score", "flops"])[0])
    top = late_flops(lambda arch: -costs.cost("flops", arch))
    assert np.mean(top) > np.mean(front) + 0.5 * np.std(front)
    assert np.quantile(front, 0.2) < np.quantile(top, 0.2)
