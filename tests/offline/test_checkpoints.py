# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The checkpoints of a run: found by all names that they are given, and what does not fit is refused in a sentence."""

import re
import subprocess
import warnings

import huggingface_hub
import pytest
import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from composer_bema.formats.manifest import write_manifest
from composer_bema.offline.checkpoints import Found, find_checkpoints, open_initial_model, open_sources
from composer_bema.offline.settings import Setting
from composer_bema.offline.stabilize import stabilize

# The mean of the checkpoints of steps 2 and 4, and half of that and half of the initial model.
LAWA = Setting('lawa', {'window': 2})
EMA = Setting('ema', {'smoothing': 0.5})


def tensors(value=0.0, **others):
    return {'a': torch.full((2, 3), value), 'b': torch.full((4,), value), 'n': torch.tensor(int(value)), **others}


def save_huggingface(folder, weights, name='model.safetensors'):
    folder.mkdir(parents=True)
    if name.endswith('.bin'):
        torch.save(weights, folder / name)
    else:
        save_file(weights, folder / name)
    return folder


def composer_state(weights, batch=2, **others):
    return {'state': {'model': weights, 'timestamp': {'Timestamp': {'epoch': 0, 'batch': batch}}, **others}}


def save_composer(file, weights, **others):
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(composer_state(weights, **others), file)
    return file


def save_in_parts(folder, weights):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        dcp.save(composer_state(weights), storage_writer=dcp.FileSystemWriter(folder))
    return folder


def steps_and_names(folder):
    return [(found.step, found.path.name) for found in find_checkpoints(folder)]


def assert_refused(checkpoints, message, setting=LAWA, error=ValueError, **kwargs):
    """It is one sentence or two in one line, and neither the folder to write nor that around it is there then."""
    out = checkpoints.parent / 'results' / 'out'
    with pytest.raises(error, match=message) as info:
        stabilize(checkpoints, out, setting, **kwargs)
    assert '\n' not in str(info.value)
    assert not out.parent.exists()


# Finding them


@pytest.mark.parametrize(
    'name',
    ['checkpoint-{}', 'step{}', 'step_{}', 'step-{}', 'ba{}', 'ep1-ba{}', 'ep0-ba{}-rank0.pt', 'x-y_1-{}.safetensors'],
)
def test_checkpoints_are_in_the_order_of_their_steps(tmp_path, name):
    """The order is that of numbers and not that of names."""
    for step in (1000, 9, 20):
        path = tmp_path / name.format(step)
        path.touch() if path.suffix else path.mkdir()
    assert steps_and_names(tmp_path) == [(step, name.format(step)) for step in (9, 20, 1000)]


@pytest.mark.parametrize('suffix', ['.pt', '.pt.gz', '.pt.zst', '.pt.tar.gz'])
def test_compressed_checkpoints_and_epochs(tmp_path, suffix):
    names = [f'ep0-ba5-rank0{suffix}', f'ep1-ba10-rank0{suffix}']
    for name in names:
        (tmp_path / name).touch()
    assert steps_and_names(tmp_path) == list(zip([5, 10], names, strict=True))


def test_a_checkpoint_may_be_of_step_0_and_numbers_may_begin_with_zeros(tmp_path):
    for name in ('step0', 'step000500'):
        (tmp_path / name).mkdir()
    assert steps_and_names(tmp_path) == [(0, 'step0'), (500, 'step000500')]


def test_what_else_a_run_leaves_is_none(tmp_path):
    (tmp_path / 'checkpoint-4').mkdir()
    folders = ('checkpoint-4-tmp', 'tmp-checkpoint-8', 'runs', 'step', 'global_step4', 'model-8.safetensors')
    files = (
        'checkpoint-6',
        'step6',
        'ep0-ba6',
        'model-00001-of-00002.safetensors',
        'model.safetensors',
        'model-final.safetensors',
        'ep0-ba6-rank1.pt',
        'latest-rank0.pt',
        'ep0-ba6-rank0.pt.incomplete',
        'ep0-ba6-rank0.pt.2.incomplete',
        'trainer_state.json',
    )
    for name in folders:
        (tmp_path / name).mkdir()
    for name in files:
        (tmp_path / name).touch()
    assert steps_and_names(tmp_path) == [(4, 'checkpoint-4')]


def test_links_to_other_places_are_checkpoints_and_links_to_another_entry_are_not(tmp_path):
    checkpoints, elsewhere = tmp_path / 'checkpoints', tmp_path / 'elsewhere'
    checkpoints.mkdir()
    save_composer(elsewhere / 'x.pt', tensors())
    save_huggingface(elsewhere / 'y', tensors())
    (checkpoints / 'ep0-ba2-rank0.pt').symlink_to(elsewhere / 'x.pt')
    (checkpoints / 'checkpoint-4').symlink_to(elsewhere / 'y')
    (checkpoints / 'latest-rank0.pt').symlink_to('ep0-ba2-rank0.pt')
    # Such as of the best one.
    (checkpoints / 'checkpoint-6').symlink_to('checkpoint-4')
    assert steps_and_names(checkpoints) == [(2, 'ep0-ba2-rank0.pt'), (4, 'checkpoint-4')]
    assert [source.step for source in open_sources(find_checkpoints(checkpoints))] == [2, 4]


def test_a_link_to_nothing_is_refused(tmp_path):
    checkpoints = tmp_path / 'in'
    save_composer(checkpoints / 'ep0-ba4-rank0.pt', tensors())
    (checkpoints / 'ep0-ba2-rank0.pt').symlink_to(tmp_path / 'gone.pt')
    assert_refused(checkpoints, r"ep0-ba2-rank0\.pt' is a link to '.*gone\.pt', which is not there", error=OSError)


def test_there_has_to_be_a_directory_with_checkpoints(tmp_path):
    assert_refused(tmp_path / 'missing', "^No such directory of checkpoints: '.*missing'", error=FileNotFoundError)
    (tmp_path / 'empty').mkdir()
    assert_refused(
        tmp_path / 'empty', "empty' holds no checkpoints; their names look like checkpoint-100, step100, ep0"
    )
    file = tmp_path / 'model-2.safetensors'
    save_file(tensors(), file)
    assert_refused(file, 'No such directory of checkpoints', error=FileNotFoundError)


def test_a_directory_that_is_one_checkpoint_is_told_from_an_empty_one(tmp_path):
    for folder in (save_huggingface(tmp_path / 'x', tensors()), save_in_parts(tmp_path / 'y', tensors())):
        assert_refused(folder, f"'{folder}' is one checkpoint, not a directory of them; their names look like")


@pytest.mark.parametrize(
    ('one', 'other'),
    [('checkpoint-2', 'step2'), ('ep0-ba2', 'ep1-ba2'), ('step2', 'model-2.safetensors'), ('step2', 'step02')],
)
def test_two_checkpoints_of_one_step_are_refused(tmp_path, one, other):
    checkpoints = tmp_path / 'in'
    checkpoints.mkdir()
    for name in (one, other):
        path = checkpoints / name
        path.touch() if path.suffix else path.mkdir()
    one, other = sorted((one, other))
    assert_refused(checkpoints, f"{one}' and '.*{other}' are both of step 2: move one of them out of '{checkpoints}'")


# Opening them


def save_all(folder):
    """One of each kind, by step."""
    save_composer(folder / 'ep0-ba1-rank0.pt', tensors(1.0))
    save_in_parts(folder / 'ep0-ba2', tensors(2.0))
    save_composer(folder / 'ep0-ba3-rank0.pt', tensors(3.0))
    subprocess.run(['gzip', str(folder / 'ep0-ba3-rank0.pt')], check=True)
    save_file(tensors(4.0), folder / 'model-4.safetensors')
    save_huggingface(folder / 'step5', tensors(5.0), 'pytorch_model.bin')
    save_huggingface(folder / 'checkpoint-6', tensors(6.0))
    return folder


def test_all_kinds_can_be_of_one_run(tmp_path):
    sources = open_sources(find_checkpoints(save_all(tmp_path / 'in')))
    assert [source.step for source in sources] == [1, 2, 3, 4, 5, 6]
    for source in sources:
        for name, tensor in tensors(float(source.step)).items():
            assert torch.equal(source.tensors[name].read(), tensor)
    assert [source.model is None for source in sources] == [step == 4 for step in range(1, 7)]
    stabilize(tmp_path / 'in', tmp_path / 'out', Setting('lawa', {'window': 6}))
    written = load_file(tmp_path / 'out' / 'model.safetensors')
    assert torch.equal(written['b'], torch.full((4,), 3.5))
    assert written['n'] == 6


def test_sharded_checkpoints_of_other_trainers(tmp_path):
    """As torchtitan and others leave them, with a model beside its optimizer."""
    for step in (2, 4):
        nest = {'model': tensors(float(step)), 'optimizer': {'lr': 0.5}}
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            dcp.save(nest, storage_writer=dcp.FileSystemWriter(tmp_path / 'in' / f'step-{step}'))
    stabilize(tmp_path / 'in', tmp_path / 'out', LAWA)
    written = load_file(tmp_path / 'out' / 'model.safetensors')
    assert (written['b'].tolist(), written['n'].item()) == ([3.0] * 4, 4)


def test_the_size_of_a_checkpoint_is_that_of_all_its_files(tmp_path):
    save_huggingface(tmp_path / 'checkpoint-2', tensors())
    (tmp_path / 'checkpoint-2' / 'code').mkdir()
    (tmp_path / 'checkpoint-2' / 'code' / 'x.py').write_bytes(b'12345')
    save_file(tensors(), tmp_path / 'model-4.safetensors')
    folder, file = open_sources(find_checkpoints(tmp_path))
    assert folder.size == file.size + 5 == (tmp_path / 'model-4.safetensors').stat().st_size + 5


def test_a_folder_without_weights_is_refused(tmp_path):
    save_huggingface(tmp_path / 'in' / 'checkpoint-2', tensors())
    (tmp_path / 'in' / 'checkpoint-4').mkdir()
    torch.save({}, tmp_path / 'in' / 'checkpoint-4' / 'optimizer.pt')
    assert_refused(tmp_path / 'in', "checkpoint-4' holds no weights: it is neither a Hugging Face folder nor a sharded")


@pytest.mark.parametrize('step', [2, 4])
def test_bare_tensors_have_to_be_some(tmp_path, step):
    (tmp_path / 'in').mkdir()
    for each in (2, 4):
        save_file({} if each == step else tensors(), tmp_path / 'in' / f'model-{each}.safetensors')
    message = rf"model-{step}\.safetensors' cannot be read as weights: it holds no tensors; use another checkpoint"
    assert_refused(tmp_path / 'in', message)


def test_a_sharded_checkpoint_that_was_not_finished_is_refused(tmp_path):
    for step in (2, 4):
        save_in_parts(tmp_path / 'in' / f'ep0-ba{step}', tensors())
    (tmp_path / 'in' / 'ep0-ba2' / '.metadata').unlink()
    assert_refused(tmp_path / 'in', r"ep0-ba2' cannot be read as a checkpoint: it has no '\.metadata'")


# Averages


def test_a_folder_of_an_average_is_refused_and_one_of_training_weights_is_not(tmp_path):
    for step, weights in ((2, 'training'), (4, 'BEMA')):
        write_manifest(save_huggingface(tmp_path / 'in' / f'step{step}', tensors()), weights, {})
    assert_refused(
        tmp_path / 'in', r"step4' holds the BEMA weights, as its averaging\.json says, and an average of averages"
    )
    write_manifest(tmp_path / 'in' / 'step4', 'training', {})
    stabilize(tmp_path / 'in', tmp_path / 'out', LAWA)


def test_an_average_is_not_taken_for_a_checkpoint_of_the_run(tmp_path):
    """What was written here before, in the format of Composer."""
    for step in (2, 4):
        save_composer(tmp_path / 'in' / f'ep0-ba{step}-rank0.pt', tensors(), batch=step)
    stabilize(tmp_path / 'in', tmp_path / 'out', LAWA)
    assert [path.name for path in (tmp_path / 'out').glob('*.pt')] == ['ep0-ba4-rank0.pt']
    (tmp_path / 'out' / 'ep0-ba4-rank0.pt').rename(tmp_path / 'in' / 'ep0-ba6-rank0.pt')
    assert_refused(tmp_path / 'in', r"ep0-ba6-rank0\.pt' has no training weights: its model holds the LAWA average in")


@pytest.mark.parametrize(
    ('others', 'weights', 'message'),
    [
        (
            {'callbacks': {'AveragingCheckpoint': {'model_holds': 'BEMA'}}},
            'model',
            r"^The model in '.*ep0-ba4-rank0\.pt' holds the BEMA weights, .*leave the choice of weights at 'training'",
        ),
        (
            {'callbacks': {'AveragingCheckpoint': {'model_holds': 'BEMA'}}},
            'training',
            r"ep0-ba4-rank0\.pt' has no training weights: its model holds the BEMA average in their place; use a "
            r'checkpoint that has them\.$',
        ),
        (
            {'algorithms': [('EMA', {'ema_weights_active': True})]},
            'training',
            r"The model in '.*ep0-ba4-rank0\.pt' holds the average of Composer's own EMA",
        ),
    ],
)
def test_a_model_that_holds_an_average_is_refused(tmp_path, others, weights, message):
    save_composer(tmp_path / 'in' / 'ep0-ba2-rank0.pt', tensors())
    save_composer(tmp_path / 'in' / 'ep0-ba4-rank0.pt', tensors(), **others)
    assert_refused(tmp_path / 'in', message, weights=weights)


def test_weights_alone_are_taken_if_that_is_asked_for(tmp_path):
    """Which weights they are is not written anywhere."""
    for step in (2, 4):
        path = tmp_path / 'in' / f'ep0-ba{step}-rank0.pt'
        path.parent.mkdir(exist_ok=True)
        torch.save({'state': {'model': tensors(float(step))}}, path)
    assert_refused(
        tmp_path / 'in', "ep0-ba2-rank0.pt' was saved with save_weights_only, .*: ask for the 'model' weights"
    )
    stabilize(tmp_path / 'in', tmp_path / 'out', LAWA, weights='model')
    [written] = (tmp_path / 'out').glob('*.pt')
    assert torch.equal(torch.load(written)['state']['model']['b'], torch.full((4,), 3.0))


# The same tensors


SAVERS = {
    'checkpoint-{}': save_huggingface,
    'model-{}.safetensors': lambda path, weights: (path.parent.mkdir(exist_ok=True), save_file(weights, path)),
    'ep0-ba{}-rank0.pt': save_composer,
    'ep0-ba{}': save_in_parts,
}


@pytest.mark.parametrize('name', SAVERS)
@pytest.mark.parametrize(
    ('first', 'second', 'message'),
    [
        ({}, {'x': torch.ones(2)}, "'FIRST' lacks the tensor 'x', which 'SECOND' has."),
        ({'x': torch.ones(2)}, {}, "'FIRST' has a tensor 'x', which 'SECOND' lacks."),
        (
            {'b': torch.ones(2, 2)},
            {},
            "The tensor 'b' has the shape (2, 2) in 'FIRST', but (4,) in 'SECOND'.",
        ),
        (
            {'b': torch.ones(4, dtype=torch.int64)},
            {},
            "The tensor 'b' is torch.int64 in 'FIRST', but torch.float32 in 'SECOND'.",
        ),
    ],
)
def test_other_tensors_are_named(tmp_path, name, first, second, message):
    """One sentence, with the file and the tensor, and nothing is written."""
    paths = [tmp_path / 'in' / name.format(step) for step in (2, 4)]
    for path, others in zip(paths, (first, second), strict=True):
        SAVERS[name](path, tensors(**others))
    message = message.replace('FIRST', str(paths[0])).replace('SECOND', str(paths[1]))
    assert_refused(tmp_path / 'in', f'^{re.escape(message)}$')


def test_another_precision_is_no_other_tensor(tmp_path):
    """The dtype is that of the checkpoint of the average's step."""
    save_huggingface(tmp_path / 'in' / 'step2', {'a': torch.ones(2, dtype=torch.float32)})
    save_huggingface(tmp_path / 'in' / 'step4', {'a': torch.full((2,), 2.0, dtype=torch.bfloat16)})
    stabilize(tmp_path / 'in', tmp_path / 'out', LAWA)
    written = load_file(tmp_path / 'out' / 'model.safetensors')['a']
    assert written.dtype == torch.bfloat16 and written.tolist() == [1.5, 1.5]


# Damage


def cut(path, count=16):
    content = path.read_bytes()
    path.write_bytes(content[:-count])


DAMAGES = {
    'checkpoint-{}': lambda path: cut(path / 'model.safetensors'),
    'model-{}.safetensors': cut,
    'ep0-ba{}-rank0.pt': cut,
    'ep0-ba{}': lambda path: cut(path / '__0_0.distcp'),
}


@pytest.mark.parametrize('step', [2, 4])
@pytest.mark.parametrize('name', SAVERS)
def test_a_checkpoint_that_is_cut_off_is_named(tmp_path, name, step):
    for each in (2, 4):
        SAVERS[name](tmp_path / 'in' / name.format(each), tensors())
    path = tmp_path / 'in' / name.format(step)
    DAMAGES[name](path)
    assert_refused(tmp_path / 'in', f"^'{path}.*' cannot be read as (weights|a checkpoint): ")


def test_a_bin_file_that_is_cut_off_is_named(tmp_path):
    for step in (2, 4):
        save_huggingface(tmp_path / 'in' / f'step{step}', tensors(), 'pytorch_model.bin')
    cut(tmp_path / 'in' / 'step2' / 'pytorch_model.bin')
    assert_refused(tmp_path / 'in', r"step2/pytorch_model\.bin' cannot be read as weights: ")


def test_what_changes_while_it_is_read_is_named(tmp_path, monkeypatch):
    for step in (2, 4):
        save_huggingface(tmp_path / 'in' / f'step{step}', tensors())
    opened = open_sources

    def open_and_cut(*args):
        sources = opened(*args)
        cut(tmp_path / 'in' / 'step2' / 'model.safetensors')
        return sources

    monkeypatch.setattr('composer_bema.offline.trajectory.open_sources', open_and_cut)
    assert_refused(tmp_path / 'in', r"step2/model\.safetensors' cannot be read as weights: its end is missing")


# The initial model


def tied(value, prefix='', twice=True):
    """A model like those of transformers, whose head is its embedding."""
    embedding = torch.arange(6.0).view(2, 3) + value
    weights = {'model.embed_tokens.weight': embedding, 'model.norm.weight': torch.full((3,), value)}
    if twice:
        weights['lm_head.weight'] = embedding.clone()
    return {prefix + name: tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ('prefix', 'twice'),
    [('model.', True), ('', True), ('', False)],
    ids=['composer', 'huggingface with the head', 'huggingface without it'],
)
@pytest.mark.parametrize('of_the_run', [('model.', True), ('', True), ('', False)])
def test_the_initial_model_may_have_other_names(tmp_path, of_the_run, prefix, twice):
    """Composer puts `model.` in front, and has a tied head beside the embedding; Hugging Face has it once."""
    run_prefix, run_twice = of_the_run
    save = save_composer if run_prefix else save_huggingface
    save(tmp_path / 'in' / ('ep0-ba2-rank0.pt' if run_prefix else 'checkpoint-2'), tied(2.0, run_prefix, run_twice))
    initial = tmp_path / ('initial.pt' if prefix else 'initial')
    (save_composer if prefix else save_huggingface)(initial, tied(0.0, prefix, twice))
    [last] = open_sources(find_checkpoints(tmp_path / 'in'))
    source = open_initial_model(str(initial), last)
    assert (source.step, source.path) == (0, initial)
    assert set(source.tensors) == set(last.tensors)
    for name, tensor in tied(0.0, run_prefix, run_twice).items():
        assert torch.equal(source.tensors[name].read(), tensor)


def test_bare_tensors_have_a_tied_one_once_too(tmp_path):
    save_composer(tmp_path / 'in' / 'ep0-ba2-rank0.pt', tied(2.0, 'model.'))
    save_file(tied(0.0, twice=False), tmp_path / 'initial.safetensors')
    [last] = open_sources(find_checkpoints(tmp_path / 'in'))
    source = open_initial_model(str(tmp_path / 'initial.safetensors'), last)
    head = source.tensors['model.lm_head.weight'].read()
    assert torch.equal(head, tied(0.0)['lm_head.weight'])


# What two layers have in common without being one: biases, scales, and matrices that were never trained.
ALIKE = {'zeros': torch.zeros(3), 'vectors': torch.arange(3.0), 'ones': torch.ones(2, 3)}


@pytest.mark.parametrize('alike', ALIKE)
def test_equal_values_are_not_enough_to_be_tied(tmp_path, alike):
    """Of the run's own, for what the initial model lacks; of the initial model's, for what the run lacks."""
    weights, name = {**tensors(), 'x': ALIKE[alike]}, 'y'
    more = {**weights, name: ALIKE[alike].clone()}
    for run, initial, problem in ((more, weights, 'lacks the'), (weights, more, 'has a')):
        folder = tmp_path / problem.replace(' ', '-')
        save_huggingface(folder / 'in' / 'step2', run)
        save_huggingface(folder / 'initial', initial)
        message = f"initial' {problem} tensor 'y', which '.*step2' (has|lacks)"
        assert_refused(folder / 'in', message, setting=EMA, initial_model=str(folder / 'initial'))


def test_what_composer_does_not_drop_is_not_made_up(tmp_path):
    """Its checkpoints have a tied parameter under all of its names, so that one that lacks one is of another model."""
    save_composer(tmp_path / 'in' / 'ep0-ba2-rank0.pt', tied(2.0, 'model.'))
    folder = save_composer(tmp_path / 'initial.pt', tied(0.0, 'model.', twice=False))
    message = r"initial\.pt' lacks the tensor 'model\.lm_head\.weight', which"
    assert_refused(tmp_path / 'in', message, setting=EMA, initial_model=str(folder))


def test_what_composer_does_not_drop_is_no_repetition(tmp_path):
    save_composer(tmp_path / 'in' / 'ep0-ba2-rank0.pt', tied(2.0, 'model.', twice=False))
    folder = save_composer(tmp_path / 'initial.pt', tied(0.0, 'model.'))
    message = r"initial\.pt' has a tensor 'model\.lm_head\.weight', which"
    assert_refused(tmp_path / 'in', message, setting=EMA, initial_model=str(folder))


def test_a_file_can_be_the_initial_model(tmp_path):
    for step in (2, 4):
        save_huggingface(tmp_path / 'in' / f'step{step}', tensors(float(step)))
    save_file(tensors(1.0), tmp_path / 'start.safetensors')
    stabilize(tmp_path / 'in', tmp_path / 'out', EMA, initial_model=str(tmp_path / 'start.safetensors'))
    # (1 + 2) / 2 and then (3 / 2 + 4) / 2.
    assert load_file(tmp_path / 'out' / 'model.safetensors')['b'].tolist() == [2.75] * 4


def test_a_run_may_have_started_from_an_average(tmp_path):
    """Of an earlier stage of the training."""
    save_huggingface(tmp_path / 'in' / 'step2', tensors(2.0))
    write_manifest(save_huggingface(tmp_path / 'start', tensors(1.0)), 'BEMA', {})
    stabilize(tmp_path / 'in', tmp_path / 'out', EMA, initial_model=str(tmp_path / 'start'))
    assert load_file(tmp_path / 'out' / 'model.safetensors')['b'].tolist() == [1.5] * 4


def test_a_run_may_have_started_from_a_composer_checkpoint_of_an_average(tmp_path):
    """As `load_path` with `load_weights_only` has taken it: what its model holds, whatever that is."""
    save_huggingface(tmp_path / 'in' / 'step2', tensors(2.0))
    callbacks = {'AveragingCheckpoint': {'model_holds': 'BEMA'}}
    start = save_composer(tmp_path / 'start.pt', tensors(1.0), callbacks=callbacks)
    stabilize(tmp_path / 'in', tmp_path / 'out', EMA, initial_model=str(start))
    assert load_file(tmp_path / 'out' / 'model.safetensors')['b'].tolist() == [1.5] * 4


@pytest.mark.parametrize(
    ('initial', 'message'),
    [
        ({'a': torch.zeros(2, 3), 'n': torch.tensor(0)}, "initial' lacks the tensor 'b', which '.*step2' has"),
        (tensors(x=torch.ones(3)), "initial' has a tensor 'x', which '.*step2' lacks"),
        (tensors(b=torch.ones(5)), r"The tensor 'b' has the shape \(5,\) in '.*initial', but \(4,\) in '.*step2'"),
    ],
)
def test_another_model_is_no_initial_model(tmp_path, initial, message):
    save_huggingface(tmp_path / 'in' / 'step2', tensors(2.0))
    folder = save_huggingface(tmp_path / 'initial', initial)
    assert_refused(tmp_path / 'in', message, setting=EMA, initial_model=str(folder))


def test_an_untied_head_is_not_made_up(tmp_path):
    save_huggingface(tmp_path / 'in' / 'step2', {**tied(2.0), 'lm_head.weight': torch.ones(2, 3)})
    folder = save_huggingface(tmp_path / 'initial', tied(0.0, twice=False))
    message = r"initial' lacks the tensor 'lm_head\.weight', which '.*step2' has"
    assert_refused(tmp_path / 'in', message, setting=EMA, initial_model=str(folder))


def test_an_initial_model_that_is_cut_off_is_named(tmp_path):
    save_huggingface(tmp_path / 'in' / 'step2', tensors(2.0))
    folder = save_huggingface(tmp_path / 'initial', tensors())
    cut(folder / 'model.safetensors')
    message = r"initial/model\.safetensors' cannot be read as weights"
    assert_refused(tmp_path / 'in', message, setting=EMA, initial_model=str(folder))


@pytest.mark.parametrize(
    'error',
    [
        LocalEntryNotFoundError('Cannot find it in the cache.\nPlease set\nHF_HUB_OFFLINE=0.'),
        ValueError('Repo id must be in the form\n  namespace/repo_name.'),
        OSError('The network is down.'),
    ],
)
def test_a_model_that_cannot_be_downloaded_is_one_sentence(tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', fail)
    save_huggingface(tmp_path / 'in' / 'step2', tensors(2.0))
    message = "^'nobody/nothing' is neither a folder nor a model that could be downloaded from the Hugging Face hub: "
    assert_refused(tmp_path / 'in', message, setting=EMA, error=FileNotFoundError, initial_model='nobody/nothing')


def test_a_model_of_the_hub_is_where_it_was_downloaded_to(tmp_path, monkeypatch):
    folder = save_huggingface(tmp_path / 'cache', tensors(1.0))
    asked = []
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda name, **kwargs: asked.append(name) or str(folder))
    last = open_sources([Found(2, save_huggingface(tmp_path / 'step2', tensors(2.0)))])[0]
    assert open_initial_model('somebody/base', last).path == folder
    assert set(asked) == {'somebody/base'}
