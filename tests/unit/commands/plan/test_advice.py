import pytest

from abtrain.commands.plan.advice import CASES, Setting, recommend
from abtrain.commands.plan.collectives import Cluster, NodeLink
from abtrain.commands.plan.forecast import WorkerSeconds
from abtrain.commands.plan.shapes import assumed_shapes
from abtrain.recipes.phase import SHORT_RUN


def setting(rate: float, step: float = 0.1, nodes: int = 4, parameters: int = 10**7, steps: int = 2000) -> Setting:
    model = assumed_shapes(parameters, 1000)
    return Setting(lambda factoring: model, 4, steps, WorkerSeconds(step), Cluster(nodes, NodeLink(rate, 1e-4)))


def test_on_a_fast_link_data_parallel_training_is_the_better_choice() -> None:
    advice = recommend(setting(100e9))
    assert advice.choice is advice.ddp and not advice.cases


def test_on_a_slow_link_it_is_not() -> None:
    advice = recommend(setting(20e6))
    assert advice.choice.forecast.seconds < advice.ddp.forecast.seconds / 10
    assert advice.choice.name == "ab_outer" and list(advice.cases) == list(CASES)
    assert advice.choice in advice.cases.values()


def test_the_recipe_as_it_is_where_that_is_fast_enough() -> None:
    assert str(recommend(setting(3e8)).choice) == "ab_outer"


def test_a_short_run_is_for_data_parallel_training() -> None:
    advice = recommend(setting(20e6, steps=SHORT_RUN - 1))
    assert advice.choice is advice.ddp and advice.fastest is not advice.ddp
    assert recommend(setting(20e6, steps=SHORT_RUN)).choice.name == "ab_outer"


def test_the_slower_the_link_the_rarer_the_merges() -> None:
    choices = [recommend(setting(rate)).choice for rate in (1e11, 1e8, 1e7, 1e5)]
    rounds = [max(phase.rounds.every if phase.rounds else 1 for phase in choice.recipe.phases) for choice in choices]
    assert rounds == sorted(rounds) and rounds[0] < rounds[-1]


def test_no_other_is_much_faster_than_the_choice() -> None:
    for rate in (1e7, 1e8, 1e9, 1e10):
        advice = recommend(setting(rate))
        assert advice.choice.forecast.seconds <= advice.fastest.forecast.seconds / 0.9


def test_merges_are_hidden_where_rounds_need_not_be_longer_then() -> None:
    choices = [recommend(setting(rate)).choice for rate in (3e6, 1e7, 3e7, 1e8)]
    assert any("delay=" in str(choice) for choice in choices)


def test_a_recipe_of_choice() -> None:
    advice = recommend(setting(20e6), "diloco")
    assert advice.choice.name == "diloco" and "wire=auto" in str(advice.choice) and not advice.cases


def test_rounds_that_are_longer_than_a_phase_are_not_tried() -> None:
    """Group phases of `ab` have 67 of 2,000 steps."""
    assert recommend(setting(20e6), "ab").fastest.options.get("every", 10) <= 67


def test_an_offer_by_hand() -> None:
    """Every 20th step 40 MB of weights in fp32 and a ring of 4: 60 MB a node and merge, 4.8 s at 100 Mbit/s."""
    offer = setting(1e8).offer("diloco", every=20)
    assert str(offer) == "diloco:every=20"
    assert offer.ratio == pytest.approx(1 / 20, rel=1e-3)
    assert offer.forecast.wire == pytest.approx(100 * 60e6 * 1.0484, rel=2e-3)
    assert offer.forecast.seconds == pytest.approx(2000 * 0.1 + 100 * 4.8 * 1.0484, rel=2e-3)


def test_thousands_of_nodes() -> None:
    advice = recommend(setting(10e9, step=1, nodes=2048))
    assert advice.choice.forecast.utilisation > 0.5
