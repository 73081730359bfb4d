# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Real checkpoints of tiny runs: what is asked for is what the run had, bit for bit, or is refused in a sentence."""

import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from composer.optim import ConstantWithWarmupScheduler

from composer_bema.formats.composer import open_checkpoint
from tests.distributed.programs import TOPOLOGIES, Topology, train
from tests.distributed.ranks import run_ranks
from tests.formats.runs import save_run, saved, saved_in_parts

KINDS = {'monolithic': saved, 'sharded': saved_in_parts}


def read(weights):
    return {name: tensor.read() for name, tensor in weights.items()}


def assert_same(weights, expected):
    assert set(weights) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(weights[name].to(tensor.dtype), tensor), name


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
    ('which', 'average', 'expected'),
    [
        ('average', 'BEMA', 'BEMA'),
        ('bema', 'bema', 'BEMA'),
        ('average', 'EMA', 'EMA'),
        ('ema', 'EMA', 'EMA'),
        ('training', None, 'training'),
        ('theta_0', 'BEMA', 'theta_0'),
        ('model', None, 'BEMA'),
    ],
)
def test_weights_of_a_run_with_two_averages(kind, which, average, expected):
    """The model has tied embeddings, which an average has once and the model twice."""
    path, weights = KINDS[kind]('two averages')
    checkpoint = open_checkpoint(path)
    assert (checkpoint.batch, checkpoint.model_holds) == (4, 'BEMA')
    assert checkpoint.average_names == ['BEMA', 'EMA']
    assert_same(read(checkpoint.weights(which, average)), weights[expected])
    assert list(checkpoint.weights(which, average)) == list(checkpoint.model)


def run_with_a_warmup(name: str, folder: Path) -> None:
    schedule = ConstantWithWarmupScheduler('4ba')
    train(TOPOLOGIES[name], schedulers=schedule, max_duration='8ba', save_folder=str(folder), save_interval='2ba')


@pytest.mark.parametrize('name', ['single', 'fsdp2'])
def test_learning_rates_are_those_of_the_next_step_and_of_the_peak(tmp_path, name):
    topology = TOPOLOGIES[name]
    run_ranks(run_with_a_warmup, topology.world_size, name, tmp_path)
    rates = {step: open_checkpoint(topology.checkpoint(tmp_path, step)).learning_rates for step in (2, 6)}
    # Composer's schedules lag by a step.
    assert rates == {2: ([0.005], [0.02]), 6: ([0.02], [0.02])}


@pytest.mark.parametrize('kind', KINDS)
def test_without_a_schedule_there_are_no_learning_rates_to_tell(kind):
    path, _ = KINDS[kind]('none')
    assert open_checkpoint(path).learning_rates == ([], [])


@pytest.mark.parametrize('kind', KINDS)
def test_the_ema_beside_a_bema_is_neither_the_bema_nor_the_training_weights(kind):
    path, weights = KINDS[kind]('two averages')
    ema = read(open_checkpoint(path).weights('ema', 'BEMA'))
    for name in ('BEMA', 'training', 'EMA'):
        assert not any(torch.equal(ema[n], weights[name][n]) for n in ema)


@pytest.mark.parametrize('kind', KINDS)
def test_a_bf16_model_has_its_average_in_fp32_and_frozen_weights_as_they_are(kind):
    path, weights = KINDS[kind]('bf16')
    checkpoint = open_checkpoint(path)
    average = read(checkpoint.weights())
    assert_same(average, weights['BEMA'])
    frozen = {name for name in average if '.layers.0.' in name}
    assert len(frozen) == 9
    for name, tensor in average.items():
        assert tensor.dtype == (torch.bfloat16 if name in frozen else torch.float32)
        assert torch.equal(tensor, weights['theta_0'][name]) == (name in frozen)
    assert_same(read(checkpoint.weights('training')), weights['training'])
    assert_same(read(checkpoint.weights('model')), weights['BEMA'])


@pytest.mark.parametrize('kind', KINDS)
def test_where_the_model_holds_training_weights(kind):
    path, weights = KINDS[kind]('training')
    checkpoint = open_checkpoint(path)
    assert checkpoint.model_holds == 'training'
    assert_same(read(checkpoint.weights('training')), weights['training'])
    assert_same(read(checkpoint.weights('average')), weights['BEMA'])


@pytest.mark.parametrize('kind', KINDS)
def test_statistics_of_batch_norm_have_averages_too(kind):
    path, weights = KINDS[kind]('classifier')
    checkpoint = open_checkpoint(path)
    assert checkpoint.huggingface is None
    statistics = [name for name in checkpoint.model if name.endswith(('_mean', '_var', '_tracked'))]
    assert len(statistics) == 3
    average = read(checkpoint.weights())
    assert_same(average, weights['BEMA'])
    assert_same(read(checkpoint.weights('training')), weights['training'])
    theta_0 = read(checkpoint.weights('theta_0'))
    assert_same(theta_0, {**weights['theta_0'], **{name: average[name] for name in statistics}})
    # The fourth step has been seen by both, and the mean of the third only by one.
    for name, differs in zip(statistics, [True, True, False], strict=True):
        assert torch.equal(average[name], weights['training'][name]) != differs


@pytest.mark.slow
@pytest.mark.parametrize('wrapper', ['fsdp1', 'fsdp2'])
def test_sharded_checkpoints_of_two_ranks(tmp_path, wrapper):
    weights, _ = run_ranks(save_run, 2, str(tmp_path / 'run'), Topology(2, wrapper), ('bema', 'ema'))
    checkpoint = open_checkpoint(tmp_path / 'run' / 'latest-rank0.pt')
    assert checkpoint.batch == 4
    asked = {('average', 'BEMA'): 'BEMA', ('average', 'EMA'): 'EMA', ('training', None): 'training'}
    for (which, average), expected in {**asked, ('theta_0', 'BEMA'): 'theta_0'}.items():
        assert_same(read(checkpoint.weights(which, average)), weights[expected])
    assert checkpoint.huggingface['model']['config']['content']['model_type'] == 'llama'


def test_an_average_that_is_in_the_model_alone():
    path, weights = saved('alone')
    checkpoint = open_checkpoint(path)
    assert_same(read(checkpoint.weights()), weights['BEMA'])
    with pytest.raises(ValueError, match="'theta_0' weights: of BEMA it holds the average alone, in its model"):
        checkpoint.weights('theta_0')
    with pytest.raises(ValueError, match='no training weights: its model holds the BEMA average in their place; use a'):
        checkpoint.weights('training')


def test_a_run_without_an_average_has_training_weights():
    path, weights = saved('none')
    assert_same(read(open_checkpoint(path).weights('training')), weights['training'])
    with pytest.raises(ValueError, match="holds no average, only the 'training' weights"):
        open_checkpoint(path).weights()


def test_a_checkpoint_of_weights_only_does_not_say_whose_they_are():
    path, weights = saved('weights only')
    checkpoint = open_checkpoint(path)
    assert checkpoint.batch is None
    assert_same(read(checkpoint.weights('model')), weights['BEMA'])
    for which in ('training', 'average'):
        with pytest.raises(ValueError, match="save_weights_only.*ask for the 'model' weights"):
            checkpoint.weights(which)


@pytest.mark.parametrize(
    ('which', 'average', 'message'),
    [
        ('average', None, 'holds several averages: say which one of BEMA, EMA'),
        ('average', 'DEMA', "holds no average 'DEMA', but BEMA, EMA"),
        ('theta_0', 'EMA', "no 'theta_0' weights: it has the average of EMA, its buffers ema, and training"),
        ('thta', 'BEMA', "no 'thta' weights: it has the average of BEMA, its buffers bema, ema, theta_0, and training"),
    ],
)
def test_weights_that_are_not_there(which, average, message):
    path, _ = saved('two averages')
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(path).weights(which, average)
    assert str(path) in str(error.value)


def test_the_average_in_composers_own_ema_is_not_taken_for_training_weights(tmp_path):
    nest = torch.load(saved('none').path, weights_only=False)
    nest['state']['algorithms'] = [('EMA', {'ema_weights_active': True, 'ema_model': {}})]
    torch.save(nest, tmp_path / 'x.pt')
    checkpoint = open_checkpoint(tmp_path / 'x.pt')
    assert checkpoint.weights('model')
    with pytest.raises(ValueError, match="holds the average of Composer's own EMA"):
        checkpoint.weights('training')


# What is cut, damaged or foreign


def every_read(path):
    """All that can be asked of a checkpoint of two averages."""
    checkpoint = open_checkpoint(path)
    asked = [('average', 'BEMA'), ('theta_0', 'BEMA'), ('ema', 'BEMA'), ('average', 'EMA'), ('training', None)]
    weights = {which: read(checkpoint.weights(*which)) for which in asked}
    return weights, checkpoint.huggingface, checkpoint.batch


def files_of(path):
    return sorted(file for file in path.iterdir()) if path.is_dir() else [path]


def assert_read_or_refused(path, good):
    try:
        weights, *rest = every_read(path)
    except ValueError as error:
        assert str(path) in str(error)
        assert '\n' not in str(error)
        return False
    assert rest == list(good[1:])
    for which, tensors in good[0].items():
        assert_same(weights[which], tensors)
    return True


@pytest.mark.parametrize(('kind', 'times'), [('monolithic', 100), ('sharded', 25)])
def test_a_flipped_bit_is_harmless_or_refused(tmp_path, kind, times):
    path = KINDS[kind]('two averages').path
    good = every_read(path)
    copy = KINDS[kind]('two averages').copy_to(tmp_path)
    choice = random.Random(0)
    refused = 0
    for _ in range(times):
        file = choice.choice(files_of(copy))
        content = file.read_bytes()
        place = choice.randrange(len(content))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << choice.randrange(8)]) + content[place + 1 :])
        refused += not assert_read_or_refused(copy, good)
        file.write_bytes(content)
    assert times / 4 < refused < times


@pytest.mark.parametrize('kind', KINDS)
def test_a_flipped_bit_in_a_tensor_of_ours_is_refused_by_name(tmp_path, kind):
    """The last bytes of the tensor are looked for in the files, and one bit of them changed."""
    copy = KINDS[kind]('two averages').copy_to(tmp_path)
    name = 'model.model.norm.weight'
    tensor = open_checkpoint(copy).weights('ema', 'BEMA')[name].read()
    pattern = tensor.numpy().tobytes()[-16:]
    (file,) = [file for file in files_of(copy) if pattern in file.read_bytes()]
    file.write_bytes(file.read_bytes().replace(pattern, pattern[:-1] + bytes([pattern[-1] ^ 1])))
    checkpoint = open_checkpoint(copy)
    where = "the tensor 'model.model.norm.weight' in ema of its BEMA" if kind == 'monolithic' else 'is damaged at byte'
    with pytest.raises(ValueError, match=where) as error:
        checkpoint.weights('ema', 'BEMA')[name].read()
    assert str(copy) in str(error.value)
    read(checkpoint.weights('average', 'BEMA'))


@pytest.mark.parametrize('kind', KINDS)
def test_a_file_that_is_cut_anywhere_is_refused(tmp_path, kind):
    good = every_read(KINDS[kind]('two averages').path)
    copy = KINDS[kind]('two averages').copy_to(tmp_path)
    for file in files_of(copy):
        content = file.read_bytes()
        lengths = {0, 1, 100, len(content) - 1, len(content) - 30, *range(7, len(content), len(content) // 12)}
        for length in lengths:
            file.write_bytes(content[:length])
            assert not assert_read_or_refused(copy, good), (file, length)
        file.unlink()
        with pytest.raises((ValueError, FileNotFoundError), match=str(copy)):
            open_checkpoint(copy)
        file.write_bytes(content)
    assert assert_read_or_refused(copy, good)


@pytest.mark.parametrize(
    'content', [b'', b'text', b'PK\x03\x04', pickle.dumps({'state': {}}), b'\x80\x02' + bytes(500)]
)
def test_foreign_files(tmp_path, content):
    (tmp_path / 'x.pt').write_bytes(content)
    with pytest.raises(
        ValueError, match=r"x\.pt' cannot be read as a checkpoint: its end is missing, or it is another"
    ):
        open_checkpoint(tmp_path / 'x.pt')


@pytest.mark.parametrize('content', [[1], {'model': {}}, {'state': {'model': {}}}, torch.zeros(2)])
def test_foreign_contents(tmp_path, content):
    torch.save(content, tmp_path / 'x.pt')
    with pytest.raises(ValueError, match=r"x\.pt' is no checkpoint of Composer: it holds no state of a model"):
        open_checkpoint(tmp_path / 'x.pt')


def test_foreign_folders(tmp_path):
    with pytest.raises(ValueError, match=rf"The folder '{tmp_path}' is no checkpoint\.$"):
        open_checkpoint(tmp_path)
    saved('two averages').copy_to(tmp_path)
    with pytest.raises(ValueError, match=r"name one of those in it, such as '.*/ep0-ba4-rank0\.pt'"):
        open_checkpoint(tmp_path)
    (tmp_path / 'sharded').mkdir()
    (tmp_path / 'sharded' / '__0_0.distcp').touch()
    with pytest.raises(ValueError, match=r"sharded' cannot be read .* it has no '\.metadata'"):
        open_checkpoint(tmp_path / 'sharded')


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such checkpoint: '.*nothing\.pt'"):
        open_checkpoint(tmp_path / 'nothing.pt')
    os.symlink('ep0-ba9-rank0.pt', tmp_path / 'latest-rank0.pt')
    with pytest.raises(FileNotFoundError, match=r"latest-rank0\.pt' is a link to 'ep0-ba9-rank0\.pt', which is not"):
        open_checkpoint(tmp_path / 'latest-rank0.pt')


@pytest.mark.parametrize('key', ['average', 'digests', 'shapes', 'model_holds'])
def test_a_header_that_lacks_something_is_refused(tmp_path, key):
    nest = torch.load(saved('training').path, weights_only=False)
    entry = nest['state']['callbacks']['AveragingCheckpoint']['BEMA']
    entry['header'] = entry['header'].replace(f'"{key}"', '"another"')
    torch.save(nest, tmp_path / 'x.pt')
    with pytest.raises(ValueError, match='what it says of its BEMA average cannot be read'):
        open_checkpoint(tmp_path / 'x.pt')


def test_a_buffer_that_lacks_a_tensor_is_refused(tmp_path):
    nest = torch.load(saved('training').path, weights_only=False)
    del nest['state']['callbacks']['AveragingCheckpoint']['BEMA']['buffers']['ema']['model.model.norm.weight']
    torch.save(nest, tmp_path / 'x.pt')
    with pytest.raises(ValueError, match="its BEMA average lacks the tensor 'model.model.norm.weight' of ema"):
        open_checkpoint(tmp_path / 'x.pt').weights('ema')


# What would be executed by others


class Evil:
    """Makes a file, or a folder, when it is unpickled."""

    def __init__(self, victim, how=shutil.copyfile):
        self.call = (shutil.copyfile, (__file__, str(victim))) if how is shutil.copyfile else (how, (str(victim),))

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('how', [shutil.copyfile, os.mkdir, Path])
def test_nothing_in_a_file_is_executed(tmp_path, how):
    victim = tmp_path / 'executed'
    nest = torch.load(saved('none').path, weights_only=False)
    nest['state']['callbacks']['Evil'] = {'x': Evil(victim, how)}
    torch.save(nest, tmp_path / 'x.pt')
    if how is os.mkdir:
        with pytest.raises(ValueError, match='unsupported GLOBAL posix.mkdir whose module posix is blocked'):
            open_checkpoint(tmp_path / 'x.pt')
    else:
        assert_same(read(open_checkpoint(tmp_path / 'x.pt').weights('training')), saved('none').weights['training'])
    assert not victim.exists()
    torch.load(tmp_path / 'x.pt', weights_only=False)
    assert victim.exists() == (how is not Path)


def test_nothing_in_a_sharded_checkpoint_is_executed(tmp_path):
    victim = tmp_path / 'executed'
    copy = saved_in_parts('none').copy_to(tmp_path)
    with (copy / '.metadata').open('rb') as file:
        metadata = pickle.load(file)
    metadata.planner_data['evil'] = Evil(victim)
    (copy / '.metadata').write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r'it names shutil\.copyfile, which no such metadata needs'):
        open_checkpoint(copy)
    assert not victim.exists()
    with (copy / '.metadata').open('rb') as file:
        pickle.load(file)
    assert victim.exists()
