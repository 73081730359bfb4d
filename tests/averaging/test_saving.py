# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What is saved of an average comes home to a model that it fits, to the bit, and to no other."""

import pytest
import torch

from composer_bema.averaging.digests import digests_of
from composer_bema.averaging.saving import flat_shards, loaded_tensors, shapes_of
from composer_bema.averaging.sharding import FlatShard, Shard


def make_model():
    return torch.nn.Linear(3, 2)


def saved_of(groups, model_holds='training', training_weights=None, **changes):
    """A state as it is saved, of buffers by their names."""
    tensors = groups if training_weights is None else {**groups, 'training_weights': training_weights}
    return {
        'buffers': {name: dict(group) for name, group in groups.items()},
        'training_weights': dict(training_weights or {}),
        'digests': digests_of(tensors),
        'shapes': shapes_of(tensors),
        'model_holds': model_holds,
        **changes,
    }


def average():
    return {'weight': torch.randn(2, 3), 'bias': torch.randn(2)}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)


def test_what_was_saved_comes_back():
    groups = {'theta_0': average(), 'ema': average()}
    loaded = loaded_tensors(saved_of(groups), make_model())
    assert loaded.keys() == groups.keys()
    for name, group in groups.items():
        assert_same(loaded[name], group)


def test_what_the_model_holds_is_taken_from_it():
    """A file that was written while the model held the average has that there, and here the training weights."""
    model, training_weights = make_model(), average()
    held = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    state = saved_of({'ema': held}, 'average', training_weights)
    state['buffers'] = {}
    loaded = loaded_tensors(state, model)
    assert_same(loaded['ema'], held)
    assert_same(loaded['training_weights'], training_weights)
    with pytest.raises(ValueError, match="The values of 'weight' in 'ema' are not those that were saved"):
        loaded_tensors(state, make_model())


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            lambda state: state['buffers']['ema'].pop('bias'),
            r"^The saved average lacks the values of 'bias' in 'ema'\.$",
        ),
        (
            lambda state: state['buffers']['ema'].update(weight=torch.zeros(3, 2)) or state.update(shapes={}),
            r"^The average of 'weight' has the shape \(3, 2\), but the model's has \(2, 3\)\.$",
        ),
        (
            # As many elements, of which the header says another shape.
            lambda state: state['shapes'].update(weight=[6]),
            r"^The average of 'weight' has the shape \(6,\), but the model's has \(2, 3\)\.$",
        ),
        (
            lambda state: state['buffers']['ema'].update(gain=torch.zeros(1)),
            r"^The average has a tensor 'gain' that the model lacks\.$",
        ),
        (
            lambda state: state.update(model_holds='average') or state['digests']['ema'].update(gain=0),
            r"^The average has a tensor 'gain' that the model lacks\.$",
        ),
        (
            lambda state: state['buffers']['ema']['weight'].view(-1)[5].mul_(1 + 2**-20),
            r"^The values of 'weight' in 'ema' are not those that were saved: the file is damaged, or",
        ),
        (lambda state: state['digests']['ema'].pop('bias'), "^The values of 'bias' in 'ema' are not those that were"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    state = saved_of({'ema': average()})
    change(state)
    with pytest.raises(ValueError, match=message):
        loaded_tensors(state, make_model())


# Shards


def test_shards_are_saved_as_such_and_what_is_whole_as_it_is():
    shard = Shard(torch.Size([4, 3]), start=3, is_first_replica=True)
    local, whole = torch.randn(2, 3), torch.randn(2)
    flat = flat_shards({'weight': local, 'bias': whole}, {'weight': shard, 'another': shard})
    assert flat['bias'] is whole
    assert isinstance(flat['weight'], FlatShard)
    assert (flat['weight'].shard, flat['weight'].local.data_ptr()) == (shard, local.data_ptr())
    # The shapes are those of the whole, of which all ranks know.
    assert shapes_of({'ema': flat, 'theta_0': {'c': torch.ones(())}}) == {'weight': [4, 3], 'bias': [2], 'c': []}
