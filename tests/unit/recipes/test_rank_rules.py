"""Rank rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abtrain import Energy, FixedRank, ParameterShare, SigmaCutoff
from abtrain.errors import ConfigurationError
from abtrain.recipes.rank_rules import parse_rule


def test_sigma_cutoff_keeps_values_at_the_cutoff() -> None:
    assert SigmaCutoff(0.5)([4.0, 2.0, 1.999, 1.0], 10, 4) == 2
    assert SigmaCutoff(0.0)([4.0, 2.0, 0.0], 10, 3) == 3
    assert SigmaCutoff(1.0)([4.0, 4.0, 2.0], 10, 3) == 2


def test_an_outlier_need_not_decide_what_is_kept_of_the_others() -> None:
    flat = [1.0] * 40
    spiked = [5.0, *flat]
    assert SigmaCutoff(0.22)(spiked, 50, 41) == 1
    assert SigmaCutoff(0.22, outliers=False)(spiked, 50, 41) == 41
    # However much the outlier alone holds of all.
    assert SigmaCutoff(0.22, outliers=False)([8.0, 2.0, *flat], 50, 42) == 42
    # A matrix of low rank, one with a floor of noise, and one of a single direction are cut.
    low, noisy, single = [5.0, 4.0, *[0.1] * 40], [5.0, 4.0, 4.0, *flat], [5.0, *[1e-3] * 40]
    for values, k in ((low, 2), (noisy, 3), (single, 1)):
        rules = (SigmaCutoff(0.22), SigmaCutoff(0.22, outliers=False))
        assert [rule(values, 50, len(values)) for rule in rules] == [k, k]


def test_energy_keeps_the_fewest_that_reach_the_share() -> None:
    assert Energy(0.5)([3.0, 3.0, 1.0], 5, 3) == 2
    assert Energy(0.9)([3.0, 1.0], 5, 2) == 1
    assert Energy(1.0)([3.0, 1.0, 1.0], 5, 3) == 3
    assert Energy(0.0)([3.0, 1.0], 5, 2) == 1


def test_fixed_rank_and_multiples() -> None:
    assert FixedRank(4)([1.0] * 8, 10, 8) == 4
    assert FixedRank(40)([1.0] * 8, 10, 8) == 8
    assert FixedRank(5, rank_multiple=4)([1.0] * 9, 10, 9) == 8
    assert FixedRank(5, rank_multiple=16)([1.0] * 9, 10, 9) == 9


def test_a_share_of_parameters_decides_whatever_the_spectrum() -> None:
    for values in ([1.0] * 96, [1.0, *[0.0] * 95]):
        assert ParameterShare(0.5)(values, 384, 128) == 48  # 48 (384 + 128) = 384 x 128 / 2
        assert ParameterShare(0.5, rank_multiple=32)(values, 384, 128) == 32
        assert ParameterShare(0.0)(values, 384, 128) == 1
    assert ParameterShare(1.0)([1.0] * 8, 8, 8) == 4
    assert parse_rule("share:0.6") == ParameterShare(0.6)


@given(
    values=st.lists(st.floats(0, 1e6), min_size=1, max_size=20),
    cutoff=st.floats(0, 1),
    multiple=st.integers(1, 9),
)
def test_ranks_are_always_possible(values: list[float], cutoff: float, multiple: int) -> None:
    values.sort(reverse=True)
    n = len(values)
    for rule in (
        SigmaCutoff(cutoff, multiple),
        Energy(cutoff, multiple),
        ParameterShare(cutoff, multiple),
        FixedRank(3, multiple),
    ):
        k = rule(values, n + 2, n)
        assert 1 <= k <= n
        assert k % multiple == 0 or k == n


@pytest.mark.parametrize(
    "rule",
    [
        SigmaCutoff(-0.1),
        SigmaCutoff(float("nan")),
        Energy(1.1),
        ParameterShare(2),
        FixedRank(0),
        FixedRank(2, rank_multiple=0),
    ],
)
def test_settings_that_cannot_be(rule: SigmaCutoff | Energy | FixedRank) -> None:
    assert rule.problems()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("fixed:3.5", "'fixed:3.5' has '3.5' in place of its number: use .* fixed:K with a whole K"),
        ("energy:x", "'energy:x' has 'x' in place of its number"),
        ("sigma", "'sigma' has '' in place of its number"),
        ("fixd:3", "'fixd:3' is unknown"),
    ],
)
def test_the_wrong_part_of_a_rule_is_named(text: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=f"rank rule {problem}"):
        parse_rule(text)
