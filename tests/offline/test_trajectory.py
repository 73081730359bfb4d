# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""A run's checkpoints and their averages: what is averaged and how, what is copied, and what is written down of it."""

import json

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from composer_bema.offline.outputs import MemoryWriter
from composer_bema.offline.settings import Setting
from composer_bema.offline.stabilize import stabilize
from composer_bema.offline.trajectory import Trajectory

LAWA = Setting('lawa', {'window': 2})
# Half of each, and a correction that does not fade: (theta_0 + theta_1) / 2 + theta_1 - theta_0.
BEMA = Setting('bema', {'half_life': 2, 'bias_power': 0})


def save(folder, **weights_by_step):
    """Checkpoints `step2` and so on, by their names as keywords: of each name of a tensor its values."""
    for name, weights in weights_by_step.items():
        (folder / name).mkdir(parents=True)
        tensors = {n: torch.as_tensor(values) for n, values in weights.items()}
        save_file(tensors, folder / name / 'model.safetensors')
    return folder


def computed(trajectory, averages, dtype=None):
    """The weights of averages, and the reading that they come from."""
    reading = trajectory.open(averages)
    sinks = [MemoryWriter(reading.specs(average, dtype)) for average in averages]
    reading.compute(sinks, threads=2)
    return [sink.weights for sink in sinks], reading


# What is copied


def test_what_is_no_floating_point_number_is_of_the_averages_own_step(tmp_path):
    steps = {
        f'step{n}': {'a': [float(n)], 'count': n, 'mask': [n > 2], 'code': torch.tensor([n]).byte()} for n in (2, 4, 6)
    }
    trajectory = Trajectory(save(tmp_path, **steps))
    [first, second], reading = computed(trajectory, trajectory.plan(LAWA, [4, 6]))
    assert {n: tensor.tolist() for n, tensor in first.items()} == {'a': [3.0], 'count': 4, 'mask': [True], 'code': [4]}
    assert {n: tensor.tolist() for n, tensor in second.items()} == {'a': [5.0], 'count': 6, 'mask': [True], 'code': [6]}
    assert [tensor.dtype for tensor in first.values()] == [tensor.dtype for tensor in second.values()]
    assert reading.source_of(reading.averages[0]).step == 4


def test_patterns_name_what_is_copied_too(tmp_path):
    names = ('rotary.inv_freq', 'layers.0.rotary.inv_freq', 'a', 'ab')
    trajectory = Trajectory(
        save(tmp_path, step2=dict.fromkeys(names, [2.0]), step4=dict.fromkeys(names, [4.0])), copy=['*inv_freq', 'a']
    )
    [weights], reading = computed(trajectory, trajectory.plan(LAWA), torch.bfloat16)
    assert {n: tensor.item() for n, tensor in weights.items()} == dict(zip(names, (4.0, 4.0, 4.0, 3.0), strict=True))
    # The dtype that was asked for is that of what is averaged.
    assert [weights[n].dtype for n in names] == [torch.float32] * 3 + [torch.bfloat16]
    assert reading.manifest(reading.averages[0])['copied'] == ['a', 'layers.0.rotary.inv_freq', 'rotary.inv_freq']


@pytest.mark.parametrize('pattern', ['b', 'A', 'a?', ''])
def test_a_pattern_that_fits_nothing_is_refused(tmp_path, pattern):
    trajectory = Trajectory(save(tmp_path, step2={'a': [2.0]}, step4={'a': [4.0]}), copy=['*', pattern])
    with pytest.raises(
        ValueError, match=rf"The pattern '{pattern}' of .* fits no tensor of '.*step4'".replace('?', r'\?')
    ):
        trajectory.open(trajectory.plan(LAWA))


def test_infinities_can_be_copied(tmp_path):
    weights = {'a': [1.0], 'bias': [-float('inf'), 0.0]}
    folder = save(tmp_path, step2=weights, step4=weights)
    trajectory = Trajectory(folder)
    with pytest.raises(ValueError, match=r"The tensor 'bias' in '.*step2' holds a NaN or an infinity.*--copy 'bias'"):
        computed(trajectory, trajectory.plan(LAWA))
    trajectory = Trajectory(folder, copy=['bias'])
    [found], _ = computed(trajectory, trajectory.plan(LAWA))
    assert found['bias'].tolist() == weights['bias']


def test_complex_tensors_are_not_averaged(tmp_path):
    (tmp_path / 'in').mkdir()
    for step in (2, 4):
        state = {'state': {'model': {'a': torch.ones(2), 'z': torch.full((2,), step + 1j)}}}
        torch.save(state, tmp_path / 'in' / f'ep0-ba{step}-rank0.pt')
    trajectory = Trajectory(tmp_path / 'in', weights='model')
    with pytest.raises(ValueError, match=r"The tensor 'z' in '.*ba4-rank0\.pt' is complex, .*: --copy 'z' takes it"):
        trajectory.open(trajectory.plan(LAWA))
    trajectory = Trajectory(tmp_path / 'in', weights='model', copy=['z'])
    [weights], _ = computed(trajectory, trajectory.plan(LAWA))
    assert weights['z'].tolist() == [4 + 1j] * 2
    # What is suggested can be written, too.
    stabilize(tmp_path / 'in', tmp_path / 'out', LAWA, weights='model', copy=['z'])
    [written] = (tmp_path / 'out').glob('*.pt')
    assert torch.load(written)['state']['model']['z'].tolist() == [4 + 1j] * 2


# Statistics


def test_the_statistics_of_batch_norm_are_not_extrapolated(tmp_path):
    """BEMA's own coefficients are -1/2 and 3/2, which would make of the variances 4 and 1 the variance -1/2."""
    names = ('running_var', 'net.1.running_var', 'net.1.running_mean', 'running_variance', 'weight')
    steps = {'step0': dict.fromkeys(names, [4.0]), 'step2': dict.fromkeys(names, [1.0])}
    trajectory = Trajectory(save(tmp_path, **steps))
    [average] = trajectory.plan(BEMA)
    assert average.coefficients.tolist() == pytest.approx([-1 / 2, 3 / 2])
    [weights], _ = computed(trajectory, [average])
    assert {n: tensor.item() for n, tensor in weights.items()} == pytest.approx(
        dict(zip(names, (2.5, 2.5, 2.5, -0.5, -0.5), strict=True))
    )


def test_batch_norm_evaluates_after_it(tmp_path):
    """The module of torch has no number under a root that is negative."""
    module, name = torch.nn.BatchNorm1d(2), 'running_var'
    steps = {'step0': module.state_dict(), 'step2': {**module.state_dict(), name: torch.full((2,), 0.1)}}
    trajectory = Trajectory(save(tmp_path, **steps))
    [weights], _ = computed(trajectory, trajectory.plan(BEMA))
    module.load_state_dict(weights)
    assert module.eval()(torch.ones(3, 2)).isfinite().all()
    assert weights[name].tolist() == pytest.approx([0.55, 0.55])


# What is opened


def test_only_the_checkpoints_that_are_needed_are_opened(tmp_path):
    """Damage to others is of no matter, and neither is an initial model that does not exist."""
    save(tmp_path, **{f'step{n}': {'a': [float(n)]} for n in (2, 4, 6, 8)})
    for name in ('step2', 'step8'):
        (tmp_path / name / 'model.safetensors').write_bytes(b'damaged')
    trajectory = Trajectory(tmp_path, initial_model='nobody/nothing')
    assert trajectory.steps == [0, 2, 4, 6, 8]
    [weights], reading = computed(trajectory, trajectory.plan(LAWA, [6]))
    assert weights['a'].item() == 5
    assert [source.step for source in reading.sources] == [4, 6]
    with pytest.raises(ValueError, match=r"step8/model\.safetensors' cannot be read as weights"):
        trajectory.open(trajectory.plan(LAWA, [8]))


def test_the_checkpoint_of_the_averages_step_is_needed_though_it_weighs_nothing(tmp_path):
    """What is copied comes from it: of the second period there is half, so that the average is that of the first."""
    folder = save(tmp_path, **{f'step{n}': {'a': [float(n)], 'count': n} for n in (2, 4, 6)})
    trajectory = Trajectory(folder)
    [weights], reading = computed(trajectory, trajectory.plan(Setting('swa_window', {'horizon': 4})))
    assert (weights['a'].item(), weights['count'].item()) == (3.0, 6)
    manifest = reading.manifest(reading.averages[0])
    assert [(each['step'], each['coefficient']) for each in manifest['checkpoints']] == [(2, 0.5), (4, 0.5), (6, 0.0)]


def test_an_initial_model_and_a_checkpoint_of_step_0_are_one_too_many(tmp_path):
    save(tmp_path, step0={'a': [0.0]}, step2={'a': [2.0]})
    with pytest.raises(ValueError, match="step0' is of step 0, and 'base' is named as the initial model: give one"):
        Trajectory(tmp_path, initial_model='base')
    assert Trajectory(tmp_path).steps == [0, 2]


def test_the_initial_model_is_theta_0(tmp_path):
    save(tmp_path / 'in', step2={'a': [2.0]}, step4={'a': [4.0]})
    save(tmp_path, base={'a': [1.0]})
    trajectory = Trajectory(tmp_path / 'in', initial_model=str(tmp_path / 'base'))
    [weights], reading = computed(trajectory, trajectory.plan(Setting('ema', {'smoothing': 0.5})))
    # (1 + 2) / 2 and then (3 / 2 + 4) / 2.
    assert weights['a'].item() == 2.75
    assert [(source.step, source.path.name) for source in reading.sources] == [(0, 'base'), (2, 'step2'), (4, 'step4')]


def test_an_extrapolation_out_of_the_range_of_its_dtype_leaves_nothing(tmp_path):
    """1.5 times 60000 is no number in fp16."""
    save(tmp_path / 'in', step0={'a': torch.zeros(3).half()}, step2={'a': torch.full((3,), 6e4).half()})
    with pytest.raises(ValueError, match=r"Values of the tensor 'a' are too large for torch\.float16"):
        stabilize(tmp_path / 'in', tmp_path / 'out', BEMA)
    assert [path.name for path in tmp_path.iterdir()] == ['in']
    stabilize(tmp_path / 'in', tmp_path / 'out', BEMA, dtype='bfloat16')
    assert load_file(tmp_path / 'out' / 'model.safetensors')['a'].tolist() == [90112] * 3


# What is known of it


def test_the_manifest_by_hand(tmp_path):
    save(tmp_path, **{f'step{n}': {'a': [float(n)], 'count': n} for n in (2, 4, 6)})
    setting = Setting('ema', {'smoothing': 0.75}, update_freq=2, update_after=2)
    trajectory = Trajectory(tmp_path)
    averages = trajectory.plan(setting, [4, 6])
    _, reading = computed(trajectory, averages)
    size = (tmp_path / 'step2' / 'model.safetensors').stat().st_size
    manifests = [reading.manifest(average) for average in averages]
    digests = [each.pop('xxh3_64') for each in manifests[1]['checkpoints']]
    assert manifests[1] == {
        'rule': 'ema',
        'settings': {'smoothing': 0.75, 'half_life': None, 'schedule': 'paper'},
        'update_freq': 2,
        'update_after': 2,
        'step': 6,
        'dtype': None,
        'checkpoints': [
            {'step': step, 'path': str(tmp_path / f'step{step}'), 'bytes': size, 'coefficient': coefficient}
            for step, coefficient in ((2, 9 / 16), (4, 3 / 16), (6, 1 / 4))
        ],
        'copied': ['count'],
    }
    assert [each['coefficient'] for each in manifests[0]['checkpoints']] == [3 / 4, 1 / 4]
    assert [each['xxh3_64'] for each in manifests[0]['checkpoints']] == digests[:2]
    assert len(set(digests)) == 3 and all(len(bytes.fromhex(digest)) == 8 for digest in digests)


@pytest.mark.parametrize('statistics', [True, False])
def test_the_manifest_has_the_coefficients_of_statistics_where_they_are_others(tmp_path, statistics):
    names = ('weight', 'running_var') if statistics else ('weight', 'running_variance')
    save(tmp_path, **{f'step{n}': dict.fromkeys(names, [4.0 - n]) for n in (0, 2)})
    trajectory = Trajectory(tmp_path)
    for setting, differs in ((BEMA, True), (Setting('ema', {'half_life': 2}), False)):
        _, reading = computed(trajectory, trajectory.plan(setting))
        checkpoints = reading.manifest(reading.averages[0])['checkpoints']
        found = [each.get('coefficient_of_statistics') for each in checkpoints]
        assert found == ([0.5, 0.5] if statistics and differs else [None, None])


def test_the_coefficients_of_statistics_by_hand(tmp_path):
    """Without an EMA of the parameters, BEMA's are 2 theta_t - theta_0, and the statistics those of the last step."""
    save(tmp_path, **{f'step{n}': {'weight': [1.0], 'running_var': [1.0]} for n in (0, 2)})
    trajectory = Trajectory(tmp_path)
    _, reading = computed(trajectory, trajectory.plan(Setting('bema', {'ema_power': None, 'bias_power': 0})))
    checkpoints = reading.manifest(reading.averages[0])['checkpoints']
    assert [(c['coefficient'], c['coefficient_of_statistics']) for c in checkpoints] == [(-1, 0), (2, 1)]


def test_the_manifest_says_which_weights_were_taken(tmp_path):
    """Of Composer's checkpoints, which may have several; of an initial model it is what its model holds."""
    save(tmp_path, base={'a': [1.0]})
    for step in (2, 4):
        state = {'state': {'model': {'a': torch.tensor([float(step)])}, 'timestamp': {}}}
        (tmp_path / 'in').mkdir(exist_ok=True)
        torch.save(state, tmp_path / 'in' / f'ep0-ba{step}-rank0.pt')
    torch.save(state, tmp_path / 'base.pt')
    setting = Setting('ema', {'smoothing': 0.5})
    for base, taken in (('base', None), ('base.pt', 'model')):
        for weights in ('training', 'model'):
            trajectory = Trajectory(tmp_path / 'in', initial_model=str(tmp_path / base), weights=weights)
            _, reading = computed(trajectory, trajectory.plan(setting))
            checkpoints = reading.manifest(reading.averages[0])['checkpoints']
            assert [each.get('weights') for each in checkpoints] == [taken, weights, weights]


@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
def test_the_manifest_has_the_dtype_that_was_chosen(tmp_path, dtype):
    save(tmp_path / 'in', step2={'a': [2.0]}, step4={'a': [4.0]})
    stabilize(tmp_path / 'in', tmp_path / 'out', LAWA, dtype=dtype)
    assert json.loads((tmp_path / 'out' / 'averaging.json').read_text())['dtype'] == dtype


def test_a_digest_by_hand(tmp_path):
    """As documented: XXH3-64 of the bytes of each tensor, and of the lines of these by name."""
    weights = {'b': torch.arange(3.0).bfloat16(), 'a': torch.tensor([[1, 2], [3, 4]])}
    save(tmp_path, step2=weights, step4=weights)
    a = xxhash.xxh3_64_hexdigest(b''.join(n.to_bytes(8, 'little') for n in (1, 2, 3, 4)))
    b = xxhash.xxh3_64_hexdigest(bytes.fromhex('0000803f0040'))
    assert digests_of(tmp_path) == [xxhash.xxh3_64_hexdigest(f'a {a}\nb {b}')] * 2


def digests_of(folder):
    trajectory = Trajectory(folder)
    _, reading = computed(trajectory, trajectory.plan(LAWA))
    [average] = reading.averages
    return [each['xxh3_64'] for each in reading.manifest(average)['checkpoints']]


def test_a_digest_is_of_the_tensors_by_name(tmp_path):
    """Of what is in them, under whichever order, place and file; another value or name makes another."""
    weights = {'a': torch.arange(6.0), 'b': torch.ones(2).bfloat16(), 'n': torch.tensor(3)}
    save(tmp_path / 'x', step2=weights, step4={**weights, 'b': torch.zeros(2).bfloat16()})
    (tmp_path / 'y').mkdir()
    for step in (2, 4):
        turned = dict(reversed(load_file(tmp_path / 'x' / f'step{step}' / 'model.safetensors').items()))
        torch.save({'state': {'model': turned, 'timestamp': {}}}, tmp_path / 'y' / f'ep0-ba{step}-rank0.pt')
    assert digests_of(tmp_path / 'x') == digests_of(tmp_path / 'y')
    swapped = {'c' if n == 'a' else n: tensor for n, tensor in weights.items()}
    save(tmp_path / 'z', step2=swapped, step4=swapped)
    assert len({*digests_of(tmp_path / 'x'), *digests_of(tmp_path / 'z')}) == 3


def test_what_is_read_is_known_beforehand(tmp_path):
    folder = save(tmp_path, **{f'step{n}': {'a': torch.ones(5, 2), 'count': n} for n in (2, 4, 6)})
    trajectory = Trajectory(folder)
    reading = trajectory.open(trajectory.plan(LAWA))
    # Of two checkpoints ten numbers of 4 bytes and one of 8.
    assert reading.nbytes == 2 * 48
    assert reading.scratch_bytes(2) == 2 * reading.scratch_bytes(1)
    assert {n: tuple(spec) for n, spec in reading.specs(reading.averages[0], torch.float16).items()} == {
        'a': ((5, 2), torch.float16),
        'count': ((), torch.int64),
    }


@pytest.mark.parametrize(('dtype', 'expected'), [(None, 'bfloat16'), ('float16', 'float16')])
def test_the_configuration_names_the_dtype_of_most_of_the_model(tmp_path, dtype, expected):
    """Not that of a bias that is kept in fp32, which files have first, or that of what is copied."""
    weights = {'bias': torch.ones(2), 'weight': torch.ones(2, 2).bfloat16(), 'weight_2': torch.ones(2).bfloat16()}
    save(tmp_path / 'in', step2=weights, step4=weights)
    for step in (2, 4):
        (tmp_path / 'in' / f'step{step}' / 'config.json').write_text(
            '{"model_type": "llama", "torch_dtype": "float64"}'
        )
    stabilize(tmp_path / 'in', tmp_path / 'out', LAWA, dtype=dtype, copy=['bias'])
    assert json.loads((tmp_path / 'out' / 'config.json').read_text()) == {
        'model_type': 'llama',
        'torch_dtype': expected,
    }


def test_only_two_kinds_of_weights_are_of_a_trajectory(tmp_path):
    """An average of averages has to be refused under every name."""
    save(tmp_path, step2={'a': [1.0]})
    for weights in ('average', 'ema'):
        with pytest.raises(ValueError, match=f"weights must be 'training' or 'model', not '{weights}'"):
            Trajectory(tmp_path, weights=weights)
