"""Activations by name: their strings, formulas, gradients, sizes, and what else a module must be able to do."""

from __future__ import annotations

import pytest

from sparta_kernels.nn import ACTIVATIONS, make_activation, parse_activation

# ---- strings ------------------------------------------------------------------------------------------------


def test_strings_give_a_name_and_options():
    assert parse_activation("relu") == ("relu", {})
    assert parse_activation("sparta:share=2,dynamic=false") == ("sparta", {"share": 2, "dynamic": False})
    assert parse_activation("elu:alpha=-1.5e-1") == ("elu", {"alpha": -0.15})
    assert parse_activation("gelu:approximate=tanh") == ("gelu", {"approximate": "tanh"})
    assert all(parse_activation(name) == (name, {}) for name in ACTIVATIONS)


def test_options_reach_the_module():
    sparta = make_activation("sparta:kernel_size=3,share=2,hidden=5", 6)
    assert (sparta.channels, sparta.hidden, sparta.kernel_size, sparta.share, sparta.dynamic) == (6, 5, 3, 2, True)
    assert make_activation("sparta-static:share=3", 6).share == 3
    assert make_activation("leaky-relu:negative_slope=0.2", 6).negative_slope == 0.2
    assert make_activation("elu:alpha=2", 6).alpha == 2
    assert make_activation("gelu:approximate=tanh", 6).approximate == "tanh"
    assert make_activation("prelu", 6).weight.tolist() == [0.25]
    assert make_activation("prelu:channelwise=true,init=0.5", 6).weight.tolist() == [0.5] * 6


WRONG_STRINGS = [
    ("", "be one of 'relu', .*, got ''"),
    ("swoosh", "be one of 'relu', .*, got 'swoosh'"),
    ("swoosh:share=2", "be one of 'relu', .*, got 'swoosh:share=2'"),
    ("sparta:", 'be "name" or "name:option=value,option=value"'),
    ("sparta:share", 'be "name" or "name:option=value,option=value"'),
    ("sparta:share=", 'be "name" or "name:option=value,option=value"'),
    ("sparta:share=2,", 'be "name" or "name:option=value,option=value"'),
    ("sparta: share=2", 'be "name" or "name:option=value,option=value"'),
    ("sparta:share=2;hidden=3", 'be "name" or "name:option=value,option=value"'),
    ("sparta:share=2,share=2", "name the option share once"),
    ("sparta:channels=2", "have options out of hidden, kernel_size, dynamic, share where its name is 'sparta'"),
    ("sparta-static:dynamic=true", "have options out of hidden, kernel_size, share"),
    ("relu:inplace=true", "have no options where its name is 'relu'"),
    ("sparta:kernel_size=2", "fit its options, got 'sparta:kernel_size=2': kernel_size must be odd, got 2"),
    ("sparta:share=2.5", "fit its options, .*: share must be an int, got float"),
    ("sparta:dynamic=1", "fit its options, .*: dynamic must be"),
    ("elu:alpha=inf", "fit its options, .*: alpha must be a number"),
    ("leaky-relu:negative_slope=true", "fit its options, .*: negative_slope must be a number"),
    ("prelu:channelwise=1", "fit its options, .*: channelwise must be true or false"),
    ("prelu:init=big", "fit its options, .*: init must be a number"),
    ("gelu:approximate=erf", "fit its options, .*: approximate must be none or tanh"),
]


@pytest.mark.parametrize(("string", "message"), WRONG_STRINGS)
def test_wrong_strings_are_named(string, message):
    with pytest.raises(ValueError, match=f"make_activation: activation must .*{message}"):
        make_activation(string, 6)
