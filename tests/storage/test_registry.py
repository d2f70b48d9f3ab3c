import pytest
from torch import nn

from tersetorch.storage import register_module, registry


class Network(nn.Linear):
    pass


@pytest.mark.parametrize(
    "kind,cls,config,error,match",
    [
        (1, Network, dict, TypeError, "kind must be a string, got int"),
        ("x", 3, dict, TypeError, r"cls must be a subclass of nn\.Module, got 3"),
        ("x", Network, None, TypeError, "config must be callable, got NoneType"),
        ("", Network, dict, ValueError, "kind must not be empty"),
        ("Linear", Network, dict, ValueError, "kind and cls must be new, got 'Linear' for Network"),
        ("x", nn.Linear, dict, ValueError, "kind and cls must be new, got 'x' for Linear"),
    ],
)
def test_bad_registrations_are_refused_and_change_nothing(kind, cls, config, error, match):
    before = dict(registry._by_name)
    with pytest.raises(error, match=match):
        register_module(kind, cls, config)
    assert registry._by_name == before


def test_arguments_at_their_default_are_left_out():
    assert registry.kind_of(nn.Linear(3, 2)).config(nn.Linear(3, 2)) == {"in_features": 3, "out_features": 2}
    assert registry.kind_of(nn.Linear(3, 2)).config(nn.Linear(3, 2, bias=False))["bias"] is False


def test_subclasses_have_no_kind():
    assert registry.kind_of(Network(3, 2)) is None


def test_json_lists_are_tuples_again():
    assert registry.from_json({"a": [1, [2, 3]], "b": {"c": [4]}}) == {"a": (1, (2, 3)), "b": {"c": (4,)}}
