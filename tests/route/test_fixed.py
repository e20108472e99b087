"""The router that was told."""

import pytest

from graftkit.errors import ConfigError
from graftkit.route import TARGET, Route
from graftkit.route.key import FixedRouter


def test_every_prompt_goes_to_the_named_pack_and_an_empty_one_to_the_target():
    routes = FixedRouter("law", ["math", "law"]).route(["a", "", "b"])
    assert [route.name for route in routes] == ["law", TARGET, "law"]
    assert routes[0].weights == routes[0].scores == {"law": 1.0}


def test_the_target_can_be_named():
    [route] = FixedRouter(TARGET, ["math"]).route(["a"])
    assert (route.name, route.weights) == (TARGET, {})


def test_an_unknown_name_is_refused_with_the_names_there_are():
    with pytest.raises(ConfigError, match="no pack is called 'tax'; there are law, math, target"):
        FixedRouter("tax", ["math", "law"])


def test_the_name_of_a_route_is_its_heaviest_pack():
    assert Route({"a": 0.2, "b": 0.5}, {}).name == "b"
    assert Route({}, {"a": -1.0}).name == TARGET
