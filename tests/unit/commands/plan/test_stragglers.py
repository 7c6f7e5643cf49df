import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abtrain.commands.plan.stragglers import Speeds
from abtrain.errors import ConfigurationError


def test_equal_workers_do_not_wait() -> None:
    assert Speeds(1000).slowdown(20, 1) == 1


@pytest.mark.parametrize(("share", "slow"), [(0.07, 7), (0.29, 29), (0.071, 8), (1.0, 100)])
def test_a_share_of_workers_is_slow(share: float, slow: int) -> None:
    assert Speeds(100, slow_share=share).slow == slow


def test_one_slow_worker_holds_up_all() -> None:
    assert Speeds(1000, slow_share=0.0001, slow_factor=3).slowdown(20, 1) == 3


@pytest.mark.parametrize("together", [1, 4, 64])
def test_the_same_seed_gives_the_same(together: int) -> None:
    assert Speeds(64, 0.3, seed=1).slowdown(10, together) == Speeds(64, 0.3, seed=1).slowdown(10, together)
    assert Speeds(64, 0.3, seed=1).slowdown(10, together) != Speeds(64, 0.3, seed=2).slowdown(10, together)


def test_a_single_worker_takes_its_mean_time() -> None:
    assert Speeds(1, 0.2).slowdown(5000, 1) == pytest.approx(1, abs=0.01)


def test_the_larger_of_two_by_hand() -> None:
    """The larger of two normal draws is 1/sqrt(pi) standard deviations above the mean; a small jitter is normal."""
    assert Speeds(2, 0.02).slowdown(2000, 2) == pytest.approx(1 + 0.02 * 0.5642, abs=5e-4)


@settings(deadline=None, max_examples=30)
@given(workers=st.integers(2, 200), jitter=st.floats(0.01, 0.5), steps=st.integers(2, 40))
def test_rare_meetings_wait_less(workers: int, jitter: float, steps: int) -> None:
    """Spread averages out over the steps of a round."""
    speeds = Speeds(workers, jitter)
    assert speeds.slowdown(steps, 1) <= speeds.slowdown(steps, workers) * (1 + 1e-6)


def test_thousands_of_workers() -> None:
    assert 1.3 < Speeds(4096, 0.1).slowdown(1, 4096) < 1.6
    assert 1 < Speeds(4096, 0.1).slowdown(100, 1) < 1.06
    assert Speeds(10, 0.1).slowdown(3, 4) > 1  # the last group is smaller


def test_speeds_that_cannot_be() -> None:
    with pytest.raises(ConfigurationError) as error:
        Speeds(0, jitter=-1, slow_share=2, slow_factor=0, seed=-1)
    assert len(error.value.problems) == 5
    with pytest.raises(ConfigurationError, match="faster"):
        Speeds(4, slow_factor=0.5)
