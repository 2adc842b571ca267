"""The cache of results for a model's units."""

from esam_core import Unit
from esam_core.units import cache_for_units


def test_results_are_cached_only_for_the_same_tuple():
    calls = []

    @cache_for_units
    def counted(what, units):
        calls.append(what)
        return len(units)

    units = (Unit("a", (1,)), Unit("b", (1,)))
    assert [counted("x", units) for _ in range(3)] == [2, 2, 2] and calls == ["x"]
    assert counted("y", units) == 2 and counted("x", (*units, Unit("c", (1,)))) == 3
    listed = list(units)
    assert counted("x", listed) == 2
    listed.append(Unit("c", (1,)))
    assert counted("x", listed) == 3  # a list may change, so its results are not cached
    assert calls == ["x", "y", "x", "x", "x"]
    for i in range(100):  # old results are removed
        counted(str(i), units)
    assert counted("x", units) == 2 and calls[-1] == "x"
