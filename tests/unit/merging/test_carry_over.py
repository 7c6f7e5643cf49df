"""Small changes of a weight and of its factors."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from abtrain.merging.carry_over import to_factors, to_weight


@given(st.integers(0, 2**16), st.integers(1, 4))
def test_factors_say_the_part_of_a_change_that_they_can(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A, B = draw(9, k), draw(k, 6)
    sayable = to_weight(draw(9, k), draw(k, 6), A, B)
    torch.testing.assert_close(to_weight(*to_factors(sayable, A, B), A, B), sayable, rtol=1e-6, atol=1e-6)
    E = draw(9, 6)
    said = to_weight(*to_factors(E, A, B), A, B)
    # A projection: what is left over is orthogonal to all that factors can say.
    assert abs(((E - said) * sayable).sum()) < 1e-6 * E.norm() * sayable.norm()
