# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Names are those of the bare model, whatever wraps it, and a tensor has one name."""

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from composer_bema.averaging.parameters import (
    canonical_names,
    copy_weights,
    first_names,
    local_tensor,
    named_parameters,
    named_persistent_buffers,
)


class Holder(torch.nn.Module):
    """A module with the children given, for the paths that wrappers make."""

    def __init__(self, **children: torch.nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def ddp(model: torch.nn.Module) -> DistributedDataParallel:
    """What DDP makes of a model's names, without the process group that its constructor asks for."""
    wrapper = DistributedDataParallel.__new__(DistributedDataParallel)
    torch.nn.Module.__init__(wrapper)
    wrapper.module = model
    return wrapper


def fsdp(model: torch.nn.Module) -> torch.nn.Module:
    return Holder(_fsdp_wrapped_module=model)


def compiled(model: torch.nn.Module) -> torch.nn.Module:
    return Holder(_orig_mod=model)


def bare() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))


PARAMETERS = ['0.weight', '0.bias', '1.weight', '1.bias']
BUFFERS = ['1.running_mean', '1.running_var', '1.num_batches_tracked']


def wrapped_blocks() -> torch.nn.Sequential:
    return torch.nn.Sequential(*(fsdp(checkpoint_wrapper(compiled(block))) for block in bare()))


@pytest.mark.parametrize(
    'model',
    [
        bare(),
        ddp(bare()),
        fsdp(bare()),
        compiled(bare()),
        checkpoint_wrapper(bare()),
        ddp(compiled(bare())),
        compiled(ddp(bare())),
        fsdp(ddp(compiled(bare()))),
        ddp(ddp(bare())),
        wrapped_blocks(),
        ddp(wrapped_blocks()),
        torch.nn.Sequential(*(ddp(block) for block in bare())),
        ddp(torch.nn.Sequential(*(compiled(ddp(block)) for block in bare()))),
    ],
)
def test_every_wrapping_has_the_names_of_the_bare_model(model):
    assert list(named_parameters(model)) == PARAMETERS
    assert list(named_persistent_buffers(model)) == BUFFERS
    assert canonical_names(model, list(model.state_dict())) == PARAMETERS + BUFFERS
    first = first_names(model)
    assert [first[name] for name in PARAMETERS + BUFFERS] == PARAMETERS + BUFFERS


@pytest.mark.slow
def test_the_real_compile_wrapper_keeps_names():
    """It compiles when called, and is not called here; slow is only its import."""
    assert list(named_parameters(torch.compile(bare()))) == PARAMETERS


@pytest.mark.parametrize(
    ('model', 'names'),
    [
        # A Composer model calls its network `module`; so do many others.
        (Holder(module=torch.nn.Linear(2, 2)), ['module.weight', 'module.bias']),
        (Holder(net=Holder(module=torch.nn.Linear(2, 2))), ['net.module.weight', 'net.module.bias']),
        # DDP around such a model puts one `module.` more, and only that one goes.
        (ddp(Holder(module=torch.nn.Linear(2, 2))), ['module.weight', 'module.bias']),
        (torch.nn.DataParallel(Holder(module=torch.nn.Linear(2, 2))), ['module.weight', 'module.bias']),
        (ddp(Holder(net=Holder(module=torch.nn.Linear(2, 2)))), ['net.module.weight', 'net.module.bias']),
        (ddp(Holder(module=ddp(torch.nn.Linear(2, 2)))), ['module.weight', 'module.bias']),
        (ddp(Holder(module=ddp(Holder(module=torch.nn.Linear(2, 2))))), ['module.module.weight', 'module.module.bias']),
        (Holder(module=ddp(torch.nn.Linear(2, 2))), ['module.weight', 'module.bias']),
        (Holder(submodule=ddp(torch.nn.Linear(2, 2))), ['submodule.weight', 'submodule.bias']),
        (ddp(Holder(module_list=torch.nn.Linear(2, 2))), ['module_list.weight', 'module_list.bias']),
        (fsdp(ddp(compiled(Holder(module=torch.nn.Linear(2, 2))))), ['module.weight', 'module.bias']),
    ],
)
def test_an_attribute_honestly_named_module_keeps_its_name(model, names):
    """`module.` goes only where a DDP put it, which a name alone cannot tell."""
    assert list(named_parameters(model)) == names
    assert canonical_names(model, list(model.state_dict())) == names


def test_a_component_that_only_contains_a_wrappers_name_stays():
    model = Holder(my_orig_mod=torch.nn.Linear(2, 2, bias=False))
    assert list(named_parameters(model)) == ['my_orig_mod.weight']


def tied() -> torch.nn.Module:
    model = Holder(embedding=torch.nn.Embedding(5, 3), head=torch.nn.Linear(3, 5, bias=False))
    model.head.weight = model.embedding.weight
    return model


@pytest.mark.parametrize('wrap', [lambda model: model, ddp, fsdp, lambda model: ddp(compiled(model))])
def test_a_tied_parameter_appears_once(wrap):
    """It is averaged under its first name, and a state dict's second name finds it there."""
    assert list(named_parameters(wrap(tied()))) == ['embedding.weight']
    assert first_names(wrap(tied())) == {
        'embedding.weight': 'embedding.weight',
        'head.weight': 'embedding.weight',
    }


def test_a_shared_module_appears_once():
    shared = torch.nn.BatchNorm1d(3)
    model = Holder(one=shared, two=shared)
    assert list(named_parameters(model)) == ['one.weight', 'one.bias']
    assert list(named_persistent_buffers(model)) == ['one.running_mean', 'one.running_var', 'one.num_batches_tracked']
    first = first_names(model)
    for name in ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'):
        assert first[f'two.{name}'] == first[f'one.{name}'] == f'one.{name}'


@pytest.mark.parametrize('wrap', [lambda model: model, ddp, fsdp, lambda model: ddp(compiled(model))])
def test_a_module_buffer_that_two_modules_share_has_one_name(wrap):
    model = Holder(one=torch.nn.BatchNorm1d(3), two=torch.nn.BatchNorm1d(3))
    model.two.running_mean = model.one.running_mean
    first = first_names(wrap(model))
    assert first['two.running_mean'] == 'one.running_mean'
    assert first['two.running_var'] == 'two.running_var'
    assert 'two.running_mean' not in named_persistent_buffers(wrap(model))


def test_trainable_or_not_all_parameters_have_names():
    model = bare().requires_grad_(False)
    assert list(named_parameters(model)) == PARAMETERS
    assert named_parameters(model)['0.weight'] is model[0].weight


@pytest.mark.parametrize('wrap', [lambda model: model, ddp, fsdp])
def test_buffers_that_no_state_dict_holds_are_left_alone(wrap):
    """Rotary frequencies and masks are caches of the module, and a mask of -inf has no average."""
    inner = Holder(norm=torch.nn.BatchNorm1d(2, affine=False))
    inner.register_buffer('mask', torch.full((2,), -torch.inf), persistent=False)
    inner.norm.register_buffer('cache', torch.zeros(2), persistent=False)
    inner.register_buffer('scale', torch.ones(1))
    inner.register_buffer('nothing', None)
    model = wrap(Holder(inner=inner))
    expected = [
        'inner.scale',
        *(f'inner.norm.{name}' for name in ('running_mean', 'running_var', 'num_batches_tracked')),
    ]
    assert list(named_persistent_buffers(model)) == expected
    assert canonical_names(model, list(model.state_dict())) == expected


def test_a_local_tensor_shares_memory_and_leaves_autograd():
    parameter = torch.nn.Parameter(torch.zeros(3))
    local = local_tensor(parameter)
    assert not local.requires_grad
    local.add_(1)
    assert torch.equal(parameter, torch.ones(3))


def different() -> torch.nn.Sequential:
    """The model of `bare`, with no value in common."""
    model = bare()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(3)
    return model


@pytest.mark.parametrize('wrap_target', [lambda model: model, ddp, fsdp, lambda model: ddp(compiled(model))])
@pytest.mark.parametrize('make_source', [bare, lambda: compiled(bare()), wrapped_blocks])
def test_weights_are_copied_whatever_wraps_the_models(make_source, wrap_target):
    """Parameters, frozen ones too, and the buffers of the model's state, into the memory that is there."""
    source, target = make_source(), different()
    target[0].requires_grad_(False)
    pointers = {name: tensor.data_ptr() for name, tensor in target.state_dict().items()}
    copy_weights(source, wrap_target(target))
    wanted = source.state_dict()
    for name, tensor in zip(canonical_names(source, list(wanted)), wanted.values(), strict=True):
        assert torch.equal(target.state_dict()[name], tensor)
    assert {name: tensor.data_ptr() for name, tensor in target.state_dict().items()} == pointers
    assert [p.requires_grad for p in target.parameters()] == [False, False, True, True]
    assert all(p.is_leaf and p.grad_fn is None for p in target.parameters())


def test_copied_weights_are_rounded_to_the_targets_dtype():
    source, target = bare(), different().bfloat16()
    copy_weights(source, target)
    for name, tensor in target.state_dict().items():
        assert tensor.dtype == (torch.int64 if name.endswith('tracked') else torch.bfloat16)
        assert torch.equal(tensor, source.state_dict()[name].to(tensor.dtype))


def test_what_the_source_lacks_stays():
    """Other parameters of the target, and the caches of either model."""
    source, target = Holder(body=torch.nn.Linear(2, 2)), Holder(body=torch.nn.Linear(2, 2), head=torch.nn.Linear(2, 2))
    source.register_buffer('cache', torch.ones(2), persistent=False)
    target.register_buffer('cache', torch.zeros(2), persistent=False)
    head = target.head.weight.detach().clone()
    copy_weights(source, target)
    assert torch.equal(target.body.weight, source.body.weight)
    assert torch.equal(target.head.weight, head)
    assert target.cache.tolist() == [0, 0]


def test_tied_weights_are_copied_to_tied_weights():
    source, target = tied(), tied()
    copy_weights(source, ddp(target))
    assert target.head.weight is target.embedding.weight
    assert torch.equal(target.head.weight, source.embedding.weight)


@pytest.mark.parametrize(
    ('lacking', 'name'),
    [
        (lambda: torch.nn.Sequential(torch.nn.Linear(2, 3)), '1.weight'),
        (lambda: torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3)), '1.running_mean'),
        (lambda: torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(4)), '1.weight'),
    ],
)
def test_a_target_that_lacks_a_tensor_is_an_error_that_names_it(lacking, name):
    target = lacking()
    before = [tensor.clone() for tensor in target.state_dict().values()]
    with pytest.raises(
        ValueError, match=rf"^The model to copy weights to has no tensor '{name}' of the shape \(3,\)\.$"
    ):
        copy_weights(bare(), target)
    assert all(map(torch.equal, before, target.state_dict().values()))


@pytest.mark.usefixtures('one_rank')
@pytest.mark.parametrize('placement', [Shard(0), Shard(1), Replicate()])
def test_a_distributed_parameter_gives_its_shard(placement):
    """Writing to the local tensor writes to the parameter, and no other rank is asked."""
    mesh = init_device_mesh('cpu', (1,))
    values = torch.arange(6.0).view(3, 2)
    model = Holder(layer=torch.nn.Linear(2, 3, bias=False))
    model.layer.weight = torch.nn.Parameter(distribute_tensor(values.clone(), mesh, [placement]))
    parameter = named_parameters(model)['layer.weight']
    assert isinstance(parameter, DTensor)
    local = local_tensor(parameter)
    assert type(local) is torch.Tensor
    assert not local.requires_grad
    assert torch.equal(local, values)
    local.mul_(2)
    assert torch.equal(parameter.full_tensor(), 2 * values)


@pytest.mark.usefixtures('one_rank')
def test_distributed_weights_are_copied_shard_by_shard():
    mesh = init_device_mesh('cpu', (1,))

    def sharded(values: torch.Tensor) -> torch.nn.Module:
        model = torch.nn.Linear(2, 3, bias=False)
        model.weight = torch.nn.Parameter(distribute_tensor(values, mesh, [Shard(0)]))
        return model

    source, target = sharded(torch.arange(6.0).view(3, 2)), sharded(torch.zeros(3, 2))
    copy_weights(source, target)
    assert isinstance(target.weight, DTensor)
    assert torch.equal(target.weight.full_tensor(), source.weight.full_tensor())
