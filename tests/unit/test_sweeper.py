"""Who else may own what no engine owns."""

from __future__ import annotations

import pytest

from eventwatch.sweeper import RETURN, Company


@pytest.mark.parametrize(
    ("looks", "alone"),
    [
        pytest.param([(0, False, False)], True, id="nobody was ever there"),
        pytest.param([(0, True, False)], False, id="another one watches"),
        pytest.param([(0, True, False), (RETURN - 1, False, False)], False, id="another one was there just now"),
        pytest.param([(0, True, False), (RETURN, False, False)], True, id="another one has not come back"),
        pytest.param([(0, False, True)], False, id="another one's nodes are there, it may be restarting"),
        pytest.param(
            [(0, False, True), (RETURN, False, True)], True, id="another one's nodes are all that is left"
        ),
        pytest.param(
            [(0, False, True), (RETURN, True, True), (RETURN + 1, False, True)], False, id="it came and went"
        ),
    ],
)
def test_nobody_else_may_own_a_node(looks: list[tuple[float, bool, bool]], *, alone: bool) -> None:
    company = Company()
    said = [company.is_alone(others, stamped=stamped, now=100 + at) for at, others, stamped in looks]
    assert said[-1] is alone
