# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""A run goes on from a checkpoint of its own topology or of another one with every number that was saved."""

import functools
import io
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional
from unittest import mock

import pytest
import torch
from composer import Algorithm, Evaluator, Event, State
from composer.utils.object_store import ObjectStore
from torch.distributed.checkpoint import FileSystemReader

from composer_bema import BEMA, EMA
from tests.algorithms.family import FAMILY
from tests.algorithms.test_checkpointing import assert_equal
from tests.distributed.averages import everything
from tests.distributed.programs import TOPOLOGIES, Look, full_weights, make_loader, make_model, running, train
from tests.distributed.ranks import run_ranks

MONOLITHIC = ['single', 'ddp', 'fsdp1-full', 'fsdp2-full']
SHARDED = ['fsdp1', 'fsdp1-hybrid', 'fsdp1-one-rank', 'fsdp2', 'fsdp2-one-rank']
PAIRS = [(source, target) for group in (MONOLITHIC, SHARDED) for target in group for source in group]
# These load like no other, but save as 'fsdp1-full' and 'fsdp2-full' do.
PAIRS += [
    ('fsdp1-full', 'fsdp1-full-rank0-only'),
    ('fsdp2-full', 'fsdp2-full-rank0-only'),
    ('ddp', 'fsdp2-full-rank0-only'),
]
# Of some parameters the fourth rank has nothing.
FOUR = 'fsdp2-four-ranks'
PAIRS += [(FOUR, FOUR), ('fsdp1', FOUR), ('fsdp2', FOUR), (FOUR, 'fsdp1'), (FOUR, 'fsdp2-one-rank')]

# With theta_0 of step 2 and updates at 4, 6 and 8: before the burn-in, at it, and between updates.
SAVED_STEPS = (1, 2, 5)
# What the model in the checkpoint holds depends on `save_weights` after the first update only.
CHECKPOINTS = [('average', 1), ('average', 2), ('average', 5), ('training', 5)]
CHECKPOINTS_ELSEWHERE = [('average', 5), ('training', 5)]


LAST_STEP = 8

# All ranks have the same statistics, and what an optimizer saves is not ours: the less, the faster.
RUN: dict[str, Any] = {'batch_norm': False, 'optimizer': 'sgd'}

# What was seen, by event and step.
Looks = dict[tuple[str, int], Any]


def is_saved(state: State, event: Event) -> bool:
    return event == Event.BATCH_CHECKPOINT and state.timestamp.batch.value in SAVED_STEPS


def look(state: State) -> Any:
    """All that a resumed run has to go on from, where that matters: it takes longer than a step."""
    return everything(state) if state.timestamp.batch.value in (*SAVED_STEPS, LAST_STEP) else None


def average(save_weights: str, kind: str = 'BEMA') -> list[Callable[[], Algorithm]]:
    return [functools.partial(FAMILY[kind], update_freq='2ba', update_after='2ba', save_weights=save_weights)]


def run_uninterrupted(name: str, folder: Path) -> dict[str, Any]:
    """Saves with the average, and with the training weights, as the model."""
    return {
        weights: train(
            TOPOLOGIES[name],
            look=look,
            algorithms=average(weights),
            **RUN,
            save_folder=str(folder / name / weights),
            save_interval=is_saved,
        )
        for weights in ('average', 'training')
    }


def resume_all(name: str, sources: list[str], folder: Path) -> dict[tuple[str, str, int], Any]:
    """Resumes from one checkpoint after another: to the end of the run, or for a step if it is of another topology."""
    return {
        (source, weights, step): train(
            TOPOLOGIES[name],
            look=look,
            events=['fit_start', 'batch_end'] if source == name else ['fit_start'],
            algorithms=average(weights),
            **RUN,
            load_path=TOPOLOGIES[source].checkpoint(folder / source / weights, step),
            max_duration='8ba' if source == name else f'{step + 1}ba',
        )
        for source in sources
        for weights, step in (CHECKPOINTS if source == name else CHECKPOINTS_ELSEWHERE)
    }


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('checkpoints')


@pytest.fixture(scope='module')
def uninterrupted(folder: Path) -> Callable[[str], list]:
    """`uninterrupted('ddp')` is what each rank saw in the runs that saved."""
    return functools.cache(lambda name: run_ranks(run_uninterrupted, TOPOLOGIES[name].world_size, name, folder))


@pytest.fixture(scope='module')
def resumed(folder: Path, uninterrupted: Callable[[str], list]) -> Callable[[str], list]:
    """`resumed('ddp')` is what each rank saw in the runs that went on from the checkpoints of other topologies too."""

    @functools.cache
    def run(name: str) -> list:
        sources = [source for source, target in PAIRS if target == name]
        for source in sources:
            uninterrupted(source)
        return run_ranks(resume_all, TOPOLOGIES[name].world_size, name, sources, folder)

    return run


@pytest.mark.parametrize(('source', 'target'), PAIRS)
def test_a_resumed_run_has_every_number_that_was_saved(uninterrupted, resumed, source, target):
    """When fit starts, and whole: the average's buffers and counters, the training weights, the optimizer's moments."""
    for weights, step in CHECKPOINTS if source == target else CHECKPOINTS_ELSEWHERE:
        saved = uninterrupted(source)[0][weights]['batch_end', step]
        first, *others = [rank[source, weights, step]['fit_start', step] for rank in resumed(target)]
        assert_equal(first, saved)
        for other in others:
            assert_equal(other['weights'], saved['weights'])
            assert_equal(other['optimizer'], saved['optimizer'])


@pytest.mark.parametrize('name', [source for source, target in PAIRS if source == target])
def test_a_run_resumed_where_it_was_saved_is_the_uninterrupted_one(uninterrupted, resumed, name):
    """On every rank, when fit starts and at the end."""
    for weights, step in CHECKPOINTS:
        for whole, rest in zip(uninterrupted(name), resumed(name), strict=True):
            assert_is_rest(rest[name, weights, step], whole[weights], step)


def assert_is_rest(rest: Looks, whole: Looks, step: int) -> None:
    """Asserts that what was seen since a run was resumed after a step is what was seen without an interruption."""
    assert list(rest) == [('fit_start', step), *(('batch_end', later) for later in range(step + 1, LAST_STEP + 1))]
    assert_equal(rest['fit_start', step], whole['batch_end', step])
    assert_equal(rest['batch_end', LAST_STEP], whole['batch_end', LAST_STEP])


def resume_with_weights_everywhere(path: str) -> str:
    """What is said to a model that has weights on all ranks, of which rank 0 alone loads others."""
    layout = TOPOLOGIES['fsdp2-full-rank0-only']
    has_weights = mock.patch('tests.distributed.programs.make_model', lambda *args: make_model(*args[:3]))
    with has_weights, pytest.raises(ValueError) as caught:
        train(layout, algorithms=average('average'), **RUN, load_path=path)
    return str(caught.value)


def test_weights_that_rank_0_alone_has_loaded_are_refused(folder, uninterrupted):
    uninterrupted('fsdp2-full')
    path = TOPOLOGIES['fsdp2-full'].checkpoint(folder / 'fsdp2-full' / 'average', 5)
    for message in run_ranks(resume_with_weights_everywhere, 2, path):
        assert message.startswith(f"Rank 0 alone has the weights of '{path}'")


def run_and_resume(name: str, folder: Path, **kwargs: Any) -> tuple[Looks, Looks]:
    """Runs without an interruption, and goes on from what was saved between updates."""
    run = functools.partial(train, TOPOLOGIES[name], look=look, **kwargs)
    whole = run(save_folder=str(folder), save_interval=is_saved)
    return whole, run(load_path=TOPOLOGIES[name].checkpoint(folder, 5))


def run_and_resume_in_bf16(name: str, kind: str, folder: Path) -> list[tuple[Looks, Looks]]:
    return [
        run_and_resume(
            name, folder / weights, algorithms=average(weights, kind), **RUN, dtype=torch.bfloat16, tied=True
        )
        for weights in ('average', 'training')
    ]


@pytest.mark.parametrize(
    ('name', 'kind'),
    [
        *((name, 'BEMA') for name in ('ddp', 'fsdp1', 'fsdp1-full', 'fsdp2', 'fsdp2-full')),
        *(('fsdp2', kind) for kind in FAMILY if kind != 'BEMA'),
    ],
)
def test_bf16_and_tied_weights_are_resumed_as_they_were(tmp_path, name, kind):
    """An average in fp32 does not fit into a model in bf16, and a tied weight is saved once."""
    for runs in run_ranks(run_and_resume_in_bf16, TOPOLOGIES[name].world_size, name, kind, tmp_path):
        for whole, rest in runs:
            assert_is_rest(rest, whole, 5)


def two_averages() -> list[Callable[[], Any]]:
    return [
        functools.partial(BEMA, '2ba', '2ba', eval_labels=[], save_weights='average'),
        functools.partial(EMA, '3ba', eval_labels=[]),
    ]


@pytest.mark.parametrize('name', ['fsdp1', 'fsdp2'])
def test_two_averages_share_a_sharded_checkpoint(tmp_path, name):
    ranks = run_ranks(run_and_resume, 2, name, tmp_path, algorithms=two_averages(), **RUN)
    for whole, rest in ranks:
        assert list(whole['batch_end', 5]['averages']) == ['BEMA', 'EMA']
        assert_is_rest(rest, whole, 5)


def run_and_resume_by_name(name: str, folder: Path) -> Looks:
    """Is interrupted after the step of the last checkpoint and finds it by itself."""
    run = functools.partial(
        train,
        TOPOLOGIES[name],
        look=look,
        algorithms=average('average'),
        **RUN,
        run_name='run',
        autoresume=True,
        save_folder=str(folder),
        save_interval=is_saved,
    )
    run(max_duration='5ba')
    return run()


@pytest.mark.parametrize('name', ['ddp', 'fsdp1', 'fsdp2'])
def test_autoresume_goes_on_from_the_latest_checkpoint(tmp_path, uninterrupted, name):
    ranks = run_ranks(run_and_resume_by_name, 2, name, tmp_path)
    for rest, whole in zip(ranks, uninterrupted(name), strict=True):
        assert_is_rest(rest, whole['average'], 5)


def outputs(state: State) -> torch.Tensor:
    return state.outputs.clone()  # type: ignore


def run_and_resume_with_evaluations(name: str, folder: Path) -> tuple[tuple[Looks, Looks], tuple[Looks, Looks]]:
    """What was seen after each step, and the outputs of the evaluations."""

    def run(**kwargs: Any) -> tuple[Looks, Looks]:
        evaluated = Look(outputs, ['eval_batch_end'])
        evaluator = Evaluator(label='eval', dataloader=make_loader(), subset_num_batches=1, eval_interval='2ba')
        seen = train(
            TOPOLOGIES[name],
            look=look,
            algorithms=average('average'),
            callbacks=[lambda: evaluated],
            eval_dataloader=evaluator,
            **kwargs,
        )
        return seen, evaluated.seen

    whole = run(save_folder=str(folder), save_interval=is_saved)
    return whole, run(load_path=TOPOLOGIES[name].checkpoint(folder, 5))


@pytest.mark.parametrize('name', ['ddp', 'fsdp1', 'fsdp2'])
def test_the_statistics_of_rank_0_are_those_that_are_saved(tmp_path, name):
    """Each rank's BatchNorm has seen its own data, but the averages that are evaluated are those of rank 0."""
    ranks = run_ranks(run_and_resume_with_evaluations, 2, name, tmp_path)
    ((saved, _), _), ((elsewhere, _), _) = ranks
    statistic = 'module.1.running_mean'
    assert not torch.equal(elsewhere['batch_end', 5]['weights'][statistic], saved['batch_end', 5]['weights'][statistic])
    for (whole, evaluated), (rest, evaluated_again) in ranks:
        assert_equal(rest['fit_start', 5]['weights'], saved['batch_end', 5]['weights'])
        end, expected = (without_statistics(looks['batch_end', LAST_STEP]['weights']) for looks in (rest, whole))
        assert_equal(end, expected)
        assert list(evaluated) == [('eval_batch_end', step) for step in (2, 4, 6, 8)]
        assert_equal(evaluated_again, {seen: evaluated[seen] for seen in evaluated if seen[1] > 5})
    assert_is_rest(ranks[0][1][0], saved, 5)


def without_statistics(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights.items() if not name.startswith('module.1.')}


def evaluate_loaded(name: str, path: str) -> tuple[dict[str, torch.Tensor], Any, dict[str, torch.Tensor]]:
    """The weights before an evaluation of a checkpoint, what it sees last, and the weights after it."""
    seen = Look(lambda state: (state.batch, outputs(state)), ['eval_batch_end'])
    with running(
        TOPOLOGIES[name],
        algorithms=average('average'),
        callbacks=[lambda: seen],
        **RUN,
        load_path=path,
    ) as trainer:
        before = full_weights(trainer.state)
        trainer.eval(make_loader())
        return before, seen.seen['eval_batch_end', 5], full_weights(trainer.state)


@pytest.mark.parametrize('name', ['ddp', 'fsdp1', 'fsdp1-hybrid', 'fsdp2'])
def test_evaluating_a_loaded_checkpoint_sees_the_average(folder, uninterrupted, name):
    """Without a step of training, before which no part of a model has computed anything."""
    saved = uninterrupted(name)[0]['training']['batch_end', 5]
    path = TOPOLOGIES[name].checkpoint(folder / name / 'training', 5)
    model = make_model(batch_norm=False)
    for before, (batch, seen), after in run_ranks(evaluate_loaded, TOPOLOGIES[name].world_size, name, path):
        assert_equal(before, saved['weights'])
        assert_equal(after, saved['weights'])
        model.load_state_dict(saved['weights'])
        assert not torch.allclose(seen, model(batch), rtol=1e-5, atol=1e-6)
        model.load_state_dict({**saved['weights'], **saved['averages']['BEMA']['buffers']['bema']})
        assert torch.allclose(seen, model(batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', ['ddp', 'fsdp1', 'fsdp2'])
def test_a_run_that_is_resumed_without_its_average_differs(folder, uninterrupted, name):
    """The control of the tests above: equality there is not for want of a difference."""
    whole = uninterrupted(name)[0]['training']
    rest, warned = run_ranks(
        resume_from,
        2,
        name,
        TOPOLOGIES[name].checkpoint(folder / name / 'training', 5),
        algorithms=average('training'),
        load_ignore_keys=['state/callbacks/AveragingCheckpoint*'],
    )[0]
    assert warned == ['BEMA starts anew from the weights of step 5: no average from before that step was loaded.']
    for seen in (('fit_start', 5), ('batch_end', 8)):
        assert_equal(rest[seen]['weights'], whole['batch_end', seen[1]]['weights'])
        assert_equal(rest[seen]['optimizer'], whole['batch_end', seen[1]]['optimizer'])
    resumed, uninterrupted = (looks['batch_end', 8]['averages']['BEMA'] for looks in (rest, whole))
    assert (resumed['num_updates'], uninterrupted['num_updates']) == (1, 3)
    for buffer in ('theta_0', 'ema', 'bema'):
        for n, tensor in resumed['buffers'][buffer].items():
            assert not torch.equal(tensor, uninterrupted['buffers'][buffer][n]), (buffer, n)


def resume_from(name: str, path: str, **kwargs: Any) -> tuple[Looks, list[str]]:
    """What was seen, and the warnings of ours."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        seen = train(TOPOLOGIES[name], look=look, **RUN, load_path=path, **kwargs)
    return seen, [str(warning.message) for warning in caught if 'composer_bema' in warning.filename]


def run_without_and_resume_with_an_average(name: str, folder: Path) -> tuple[Looks, tuple[Looks, list[str]]]:
    whole = train(TOPOLOGIES[name], look=look, **RUN, save_folder=str(folder), save_interval=is_saved)
    path = TOPOLOGIES[name].checkpoint(folder, 5)
    return whole, resume_from(name, path, algorithms=average('average'))


@pytest.mark.parametrize('name', ['ddp', 'fsdp1', 'fsdp2', 'fsdp2-full'])
def test_an_average_starts_anew_from_a_checkpoint_without_one(tmp_path, name):
    ranks = run_ranks(run_without_and_resume_with_an_average, 2, name, tmp_path)
    for whole, (rest, warned) in ranks:
        assert warned == ['BEMA starts anew from the weights of step 5: no average from before that step was loaded.']
        assert_equal(rest['fit_start', 5]['weights'], whole['batch_end', 5]['weights'])
        assert_equal(rest['batch_end', 8]['weights'], whole['batch_end', 8]['weights'])
        assert rest['batch_end', 8]['averages']['BEMA']['num_updates'] == 1
    theta_0 = ranks[0][1][0]['batch_end', 8]['averages']['BEMA']['buffers']['theta_0']
    assert theta_0 and all(torch.equal(t, ranks[0][0]['batch_end', 5]['weights'][n]) for n, t in theta_0.items())


@pytest.mark.parametrize('name', ['ddp', 'fsdp1', 'fsdp2', 'fsdp2-full'])
def test_a_run_without_an_average_takes_a_checkpoint_with_one(folder, uninterrupted, name):
    """It trains on from what the model in the checkpoint holds."""
    whole = uninterrupted(name)[0]['training']
    path = TOPOLOGIES[name].checkpoint(folder / name / 'training', 5)
    for rest, warned in run_ranks(resume_from, 2, name, path):
        assert warned == []
        for seen in (('fit_start', 5), ('batch_end', 8)):
            assert rest[seen]['averages'] == {}
            assert_equal(rest[seen]['weights'], whole['batch_end', seen[1]]['weights'])


def start_from_weights(name: str, path: str) -> tuple[Looks, list[str]]:
    """What was seen, and what our modules have logged."""
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logger = logging.getLogger('composer_bema')
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    seen = train(
        TOPOLOGIES[name],
        look=everything,
        events=['fit_start', 'fit_end'],
        algorithms=average('average'),
        **RUN,
        load_path=path,
        load_weights_only=True,
        load_strict_model_weights=True,
        max_duration='4ba',
    )
    return seen, logged


@pytest.mark.parametrize('name', ['ddp', 'fsdp1', 'fsdp2'])
def test_weights_alone_start_a_new_average_from_the_saved_one(folder, uninterrupted, name):
    """The model in the checkpoint is the average; nothing is left of its past."""
    saved = uninterrupted(name)[0]['average']['batch_end', 5]
    averaged = {**saved['weights'], **saved['averages']['BEMA']['buffers']['bema']}
    path = TOPOLOGIES[name].checkpoint(folder / name / 'average', 5)
    for seen, logged in run_ranks(start_from_weights, 2, name, path):
        assert 'No BEMA average was loaded: a new one starts from the loaded weights.' in logged
        assert_equal(seen['fit_start', 0]['weights'], averaged)
        assert seen['fit_end', 4]['averages']['BEMA']['num_updates'] == 1


def save_without_state_and_be_refused(name: str, folder: Path) -> list[str]:
    """The messages with which a checkpoint whose model holds an average is refused."""
    topology = TOPOLOGIES[name]
    without_state = [functools.partial(BEMA, '2ba', '2ba', state_in_checkpoint=False)]
    save: Callable[..., Any] = functools.partial(train, topology, **RUN, save_interval=is_saved)
    save(algorithms=without_state, save_folder=str(folder / 'without state'))
    save(algorithms=average('average'), save_folder=str(folder / 'with state'))
    messages = []
    for saved, algorithms, ignored in [
        ('without state', average('average'), None),
        ('without state', without_state, None),
        ('with state', [functools.partial(EMA, '2ba')], None),
        ('with state', average('average'), ['state/callbacks/*']),
    ]:
        path = topology.checkpoint(folder / saved, 5)
        messages.append(refusal(name, path, algorithms=algorithms, load_ignore_keys=ignored))
    return messages


def refusal(name: str, path: str, **kwargs: Any) -> str:
    """The error with which a checkpoint is refused."""
    with pytest.raises(BaseException) as refused, running(TOPOLOGIES[name], **RUN, load_path=path, **kwargs):
        pass
    return f'{refused.typename}: {refused.value}'


@pytest.mark.parametrize('name', ['fsdp1', 'fsdp2'])
def test_nobody_trains_on_from_a_sharded_average_unawares(tmp_path, name):
    """As from a monolithic one: without the average's state, with another average, with the state left out."""
    for messages in run_ranks(save_without_state_and_be_refused, 2, name, tmp_path):
        assert len(messages) == 4
        for message in messages:
            assert message == (
                'ValueError: The model in the checkpoint holds the BEMA weights, and no training weights were loaded '
                'with it: resume with BEMA among the algorithms and its state in the checkpoint, or start a new run '
                'from the average with load_weights_only=True.'
            )


def resume_without_state(name: str, folder: Path) -> tuple[Looks, list[str]]:
    settings = {'save_weights': 'training', 'state_in_checkpoint': False}
    algorithms = [functools.partial(BEMA, '2ba', '2ba', **settings)]
    train(TOPOLOGIES[name], algorithms=algorithms, **RUN, save_folder=str(folder), save_interval=is_saved)
    return resume_from(name, TOPOLOGIES[name].checkpoint(folder, 5), algorithms=algorithms)


@pytest.mark.parametrize('name', ['fsdp1', 'fsdp2'])
def test_without_its_state_a_sharded_average_starts_anew(tmp_path, uninterrupted, name):
    whole = uninterrupted(name)[0]['training']
    rest, warned = run_ranks(resume_without_state, 2, name, tmp_path)[0]
    assert warned == ['BEMA starts anew from the weights of step 5: no average from before that step was loaded.']
    assert_equal(rest['fit_start', 5]['weights'], whole['batch_end', 5]['weights'])
    # Not the header alone: nothing of the average is in the files.
    entries = [key for key in saved_keys(tmp_path / 'ep0-ba5') if 'AveragingCheckpoint' in key]
    assert entries == ['state.callbacks.AveragingCheckpoint.model_holds']


def saved_keys(checkpoint: Path) -> list[str]:
    return list(FileSystemReader(checkpoint).read_metadata().state_dict_metadata)


class Bucket(ObjectStore):
    """A folder that can be reached as an object store only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get_uri(self, object_name: str) -> str:
        return f's3://bucket/{object_name}'

    def download_object(self, object_name: str, filename: Any, overwrite: bool = False, callback: Any = None) -> None:
        shutil.copy(self.folder / object_name, filename)


def resume_from_object_store(name: str, folder: Path, load_path: str) -> Looks:
    def find(uri: str) -> Optional[Bucket]:
        return Bucket(folder) if uri.startswith('s3://') else None

    with (
        mock.patch('composer.trainer.trainer.maybe_create_object_store_from_uri', find),
        mock.patch('composer_bema.algorithms.checkpointing.maybe_create_object_store_from_uri', find),
    ):
        return resume_from(name, load_path, algorithms=average('average'))[0]


@pytest.mark.parametrize('load_path', ['s3://bucket/ep0-ba5', 's3://bucket/latest.symlink'])
def test_a_sharded_checkpoint_is_resumed_from_an_object_store(folder, uninterrupted, load_path):
    """By its address, or by that of the file that names the latest one."""
    whole = uninterrupted('fsdp2')
    checkpoints = folder / 'fsdp2' / 'average'
    (checkpoints / 'latest.symlink').write_text('ep0-ba5')
    ranks = run_ranks(resume_from_object_store, 2, 'fsdp2', checkpoints, load_path, timeout=60)
    for rest, looks in zip(ranks, whole, strict=True):
        assert_is_rest(rest, looks['average'], 5)


def be_refused_from_a_store(folder: Path) -> str:
    return refusal('fsdp2', 'ep0-ba5', algorithms=average('average'), load_object_store=Bucket(folder))


def test_an_object_store_that_is_given_by_hand_is_refused(folder, uninterrupted):
    """Composer tells nobody of it."""
    uninterrupted('fsdp2')
    for message in run_ranks(be_refused_from_a_store, 2, folder / 'fsdp2' / 'average', timeout=60):
        assert message == (
            "ValueError: The averages in 'ep0-ba5' cannot be read: a load_object_store is not handed on to callbacks, "
            'so give load_path as a URI.'
        )


def be_refused(name: str, paths: list[Path]) -> list[str]:
    return [refusal(name, str(path), algorithms=average('average')) for path in paths]


def copy_checkpoint(source: str, target: Path) -> Path:
    """A copy to damage."""
    copy = shutil.copytree if Path(source).is_dir() else shutil.copy
    return Path(copy(source, target))


def files_in(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {file.name: file.read_bytes() for file in files}


def find_tensor(checkpoint: Path, place: str, n: str) -> tuple[Path, torch.Tensor]:
    """Where a tensor is kept, and what is kept there: the whole, or the last of its shards."""
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=False)['state']
        at: Any = {**state['callbacks']['AveragingCheckpoint']['BEMA'], 'model': state['model']}
        for key in place.split('/'):
            at = at[key]
        return checkpoint, at[n]
    entry = 'model' if place == 'model' else f'callbacks.AveragingCheckpoint.BEMA.{place.replace("/", ".")}'
    stored = FileSystemReader(checkpoint).read_metadata().storage_data
    shards = [info for index, info in stored.items() if index.fqn == f'state.{entry}.{n}']
    info = max(shards, key=lambda info: info.relative_path)
    file = checkpoint / info.relative_path
    return file, torch.load(io.BytesIO(file.read_bytes()[info.offset : info.offset + info.length]), weights_only=True)


def flip_a_bit(file: Path, values: bytes, place: int) -> None:
    """Flips a bit within values that a file has once."""
    content = bytearray(file.read_bytes())
    assert content.count(values) == 1
    content[content.find(values) + place] ^= 2
    file.write_bytes(content)


@pytest.mark.parametrize('name', ['ddp', 'fsdp1', 'fsdp2'])
def test_a_flipped_bit_is_noticed_on_every_rank(tmp_path, folder, uninterrupted, name):
    """In what is kept of the average, and in the model that holds it; in a shard that the first rank does not read."""
    uninterrupted(name)
    weight = 'module.4.weight'
    damaged = {}
    for place in ('buffers/theta_0', 'buffers/ema', 'training_weights', 'model'):
        checkpoint = copy_checkpoint(
            TOPOLOGIES[name].checkpoint(folder / name / 'average', 5), tmp_path / place.replace('/', '-')
        )
        file, tensor = find_tensor(checkpoint, place, weight)
        flip_a_bit(file, tensor.numpy().tobytes(), place=tensor.numel() * 2)
        damaged[place] = checkpoint
    before = [files_in(checkpoint) for checkpoint in damaged.values()]
    for messages in run_ranks(be_refused, 2, name, list(damaged.values())):
        for (place, checkpoint), message in zip(damaged.items(), messages, strict=True):
            values = 'bema' if place == 'model' else place.removeprefix('buffers/')
            assert message == (
                f"ValueError: The BEMA average in '{checkpoint}' cannot be restored: The values of '{weight}' in "
                f"'{values}' are not those that were saved: the file is damaged, or the model does not hold the "
                'weights that were saved with the average.'
            )
    assert [files_in(checkpoint) for checkpoint in damaged.values()] == before


@pytest.mark.parametrize('name', ['ddp', 'fsdp1'])
def test_a_flipped_bit_in_a_counter_is_noticed(tmp_path, folder, uninterrupted, name):
    uninterrupted(name)
    checkpoint = copy_checkpoint(TOPOLOGIES[name].checkpoint(folder / name / 'average', 5), tmp_path / 'damaged')
    counter = b'"num_updates": 1'
    flip_a_bit(checkpoint if checkpoint.is_file() else checkpoint / '__0_0.distcp', counter, place=len(counter) - 1)
    for messages in run_ranks(be_refused, 2, name, [checkpoint]):
        assert messages[0].startswith(f"ValueError: The BEMA average in '{checkpoint}' cannot be restored: ")


@pytest.mark.parametrize('name', ['fsdp1', 'fsdp2'])
def test_a_cut_file_is_refused_in_one_sentence(tmp_path, folder, uninterrupted, name):
    """What is cut off is of the average: what Composer reads is there."""
    uninterrupted(name)
    checkpoint = copy_checkpoint(TOPOLOGIES[name].checkpoint(folder / name / 'average', 5), tmp_path / 'cut')
    stored = FileSystemReader(checkpoint).read_metadata().storage_data
    end = max(info.offset for info in stored.values() if info.relative_path == '__1_0.distcp')
    assert all('.AveragingCheckpoint.' in index.fqn for index, info in stored.items() if info.offset == end)
    os.truncate(checkpoint / '__1_0.distcp', end + 9)
    before = files_in(checkpoint)
    for (message,) in run_ranks(be_refused, 2, name, [checkpoint]):
        assert message.startswith(f"ValueError: The averages in '{checkpoint}' cannot be read: ")
        assert 'Traceback' not in message and len(message) < 500
    assert files_in(checkpoint) == before


@pytest.mark.parametrize('name', ['ddp', 'fsdp1', 'fsdp2'])
@pytest.mark.parametrize('damage', ['gone', 'half'])
def test_no_rank_hangs_on_a_checkpoint_that_lacks_more(tmp_path, folder, uninterrupted, name, damage):
    """What Composer cannot read, it refuses in its own words."""
    uninterrupted(name)
    checkpoint = copy_checkpoint(TOPOLOGIES[name].checkpoint(folder / name / 'average', 5), tmp_path / 'checkpoint')
    file = checkpoint if checkpoint.is_file() else checkpoint / '__1_0.distcp'
    if damage == 'gone':
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2)
    ranks = run_ranks(be_refused, 2, name, [checkpoint], timeout=60)
    assert all(message for (message,) in ranks)
    assert not file.exists() if damage == 'gone' else file.stat().st_size > 0
