"""Hooks come off without a trace, whatever was put on before, after or around them."""

import pytest
import torch
from accelerate.hooks import ModelHook as OffloadHook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from diffaccel.hooks import install


class Adds(ModelHook):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def new_forward(self, module, *args, **kwargs):
        return self.fn_ref.original_forward(*args, **kwargs) + self.value


class AddsAfter(ModelHook):
    def post_forward(self, module, output):
        return output + 100


def zero():
    module = nn.Identity()
    return module, lambda: float(module(torch.zeros(())))


def test_nothing_is_left_behind():
    module, value = zero()
    before = dict(vars(module))
    remove = install(module, Adds(1), "one")
    assert value() == 1
    remove()
    assert vars(module) == before and value() == 0


def test_own_forward_of_an_instance_is_kept():
    module, value = zero()
    module.forward = own = lambda x: x + 10
    remove = install(module, Adds(1), "one")
    assert value() == 11
    remove()
    assert module.forward is own


@pytest.mark.parametrize("first", [0, 1, 2])
def test_any_order_of_removal(first):
    module, value = zero()
    removes = [install(module, Adds(10**i), f"h{i}") for i in range(3)]
    assert value() == 111
    order = [first, *(i for i in range(3) if i != first)]
    left = 111
    for i in order:
        removes[i]()
        left -= 10**i
        assert value() == left
    assert "forward" not in vars(module) and "_diffusers_hook" not in vars(module)


@pytest.mark.parametrize("other", [Adds(100), AddsAfter()])
def test_a_hook_of_diffusers_put_on_later_stays(other):
    module, value = zero()
    remove = install(module, Adds(1), "one")
    HookRegistry.check_if_exists_or_initialize(module).register_hook(other, "other")
    assert value() == 101
    remove()
    assert value() == 100
    module._diffusers_hook.remove_hook("other")
    assert value() == 0


def test_a_hook_of_diffusers_put_on_earlier_stays():
    module, value = zero()
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(AddsAfter(), "other")
    remove = install(module, Adds(1), "one")
    assert value() == 101
    remove()
    assert value() == 100 and module._diffusers_hook is registry


class Offload(OffloadHook):
    def post_forward(self, module, output):
        return output + 1000


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("remove_ours_first", [True, False])
def test_accelerate_wrappers_stay(ours_first, remove_ours_first):
    module, value = zero()
    if ours_first:
        remove = install(module, Adds(1), "one")
        add_hook_to_module(module, Offload())
    else:
        add_hook_to_module(module, Offload())
        remove = install(module, Adds(1), "one")
    assert value() == 1001
    if remove_ours_first:
        remove()
        assert value() == 1000
        remove_hook_from_module(module)
        assert value() == 0
    elif ours_first:
        remove_hook_from_module(module)
        assert value() == 1
        remove()
        assert value() == 0
