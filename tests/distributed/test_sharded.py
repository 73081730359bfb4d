# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The average of a model that several ranks share is that of the whole model, and training goes on as without it."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import peft
import pytest
import torch
from composer import Algorithm, Evaluator, Event, Logger, State, Trainer
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from composer.utils import FSDPConfig, dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from composer_bema import BEMA
from composer_bema import functional as cf
from composer_bema.algorithms.weight_averaging import WeightAveraging, averages_among
from composer_bema.averaging.parameters import local_tensor, named_parameters
from composer_bema.averaging.rules import Rule
from composer_bema.averaging.sharding import FlatShard
from composer_bema.averaging.state import AverageState
from composer_bema.formats.entries import pack_entry, unpack_entry
from tests.algorithms.family import FAMILY, FUNCTIONS, REPLACING
from tests.algorithms.test_checkpointing import assert_equal
from tests.distributed.averages import averages_and_weights
from tests.distributed.programs import (
    TOPOLOGIES,
    Look,
    Topology,
    full_weights,
    in_full,
    make_loader,
    make_model,
    running,
    train,
)
from tests.distributed.ranks import run_ranks

SHARDED = ['fsdp1', 'fsdp1-grad-op', 'fsdp1-hybrid', 'fsdp2', 'fsdp2-grad-op']
ACCUMULATED = {'device_train_microbatch_size': 2}
COMPILED = {'compile_config': {'backend': 'eager'}}


class Setup(NamedTuple):
    topology: str
    average: str = 'BEMA'
    kwargs: dict[str, Any] = {}
    """The other arguments of the Trainer."""


RUNS = {
    **{name: Setup(name) for name in ['ddp', *SHARDED]},
    **{f'{name}-compiled': Setup(name, kwargs={**COMPILED, **ACCUMULATED}) for name in ('ddp', 'fsdp1', 'fsdp2')},
    **{f'fsdp2, {average}': Setup('fsdp2', average) for average in FUNCTIONS if average != 'BEMA'},
}
# With theta_0 of step 1.
UPDATES = (3, 5)
LAST_STEP = 6


def make(average: str, **settings: Any) -> Callable[[], WeightAveraging]:
    return functools.partial(FAMILY[average], update_freq='2ba', update_after='1ba', **settings)


bema = functools.partial(make, 'BEMA')


class Communication(TorchDispatchMode):
    """Notes what the ranks say to each other: the operation and the number of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ('c10d', '_c10d_functional'):
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.noted.append((func._opname, sum(tensor.numel() for tensor in tensors)))
        return func(*args, **(kwargs or {}))


class Followed(NamedTuple):
    """What a rank saw of a run."""

    steps: dict[tuple[str, int], Any]
    """The averages, if there are any, and the weights."""
    evaluations: dict[tuple[str, int], Any]
    """The last batch of each evaluation and its outputs."""
    predictions: list[torch.Tensor]
    metrics: dict[str, list[float]]
    communication: list[list[tuple[str, int]]]
    """What was said in each update."""
    sizes: dict[str, dict[str, tuple[str, int]]]
    """What is held of the parameters, and of each buffer: classes and numbers of elements."""


def in_and_out(state: State) -> tuple[Any, torch.Tensor]:
    return state.batch, state.outputs.clone()  # type: ignore


def follow(name: str, algorithms: list[Callable[[], Algorithm]], **kwargs: Any) -> Followed:
    """Trains in two fits, with evaluations before, within and after them and a prediction in between."""
    steps, evaluations = Look(averages_and_weights, ['batch_end']), Look(in_and_out, ['eval_batch_end'])
    logger = InMemoryLogger()
    communication: list[list[tuple[str, int]]] = []
    update = AverageState.update

    def noting_update(*args: Any) -> Any:
        with Communication() as said:
            coefficients = update(*args)
        communication.append(said.noted)
        return coefficients

    evaluator = Evaluator(label='eval', dataloader=make_loader(), subset_num_batches=1, eval_interval='2ba')
    with (
        mock.patch.object(AverageState, 'update', noting_update),
        running(
            TOPOLOGIES[name],
            algorithms=algorithms,
            callbacks=[lambda: steps, lambda: evaluations],
            eval_dataloader=evaluator,
            max_duration='4ba',
            loggers=[logger],
            **kwargs,
        ) as trainer,
    ):
        trainer.eval()
        trainer.fit()
        predictions = trainer.predict(make_loader(), subset_num_batches=1)
        trainer.fit(duration='2ba')
        trainer.eval()
        metrics = {key: [value for _, value in series] for key, series in logger.data.items()}
        return Followed(steps.seen, evaluations.seen, predictions, metrics, communication, sizes(trainer.state))


def sizes(state: State) -> dict[str, dict[str, tuple[str, int]]]:
    parameters = {n: p for n, p in named_parameters(state.model).items() if p.requires_grad}
    held = {'parameters': {n: ('Tensor', local_tensor(p).numel()) for n, p in parameters.items()}}
    for average in averages_among(state.algorithms):
        for name, kept in average.saved_state()['buffers'].items():
            tensors = {n: t.local if isinstance(t, FlatShard) else t for n, t in kept.items() if n in parameters}
            held[name] = {n: (type(t).__name__, t.numel()) for n, t in tensors.items()}
    return held


def follow_with_and_without(name: str, average: str, **kwargs: Any) -> dict[str, Followed]:
    return {'with': follow(name, [make(average)], **kwargs), 'without': follow(name, [], **kwargs)}


def follow_on_the_host(name: str) -> Followed:
    return follow(name, [bema(device='cpu', nonfinite='ignore')])


@pytest.fixture(scope='module')
def followed() -> Callable[[str], list[dict[str, Followed]]]:
    """`followed('fsdp1')` is what each rank saw of a run with an average, and of one without."""

    @functools.cache
    def run(name: str) -> list[dict[str, Followed]]:
        topology, average, kwargs = RUNS[name]
        return run_ranks(follow_with_and_without, TOPOLOGIES[topology].world_size, topology, average, **kwargs)

    return run


def model_with(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    model = make_model()
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize('name', RUNS)
def test_the_average_is_that_of_the_whole_weights(followed, name):
    """Number for number what the functional face makes of the weights of each step, brought together."""
    seen = followed(name)[0]['with'].steps
    average = FUNCTIONS[RUNS[name].average](make_model(), update_freq=2, update_after=1)
    for step in range(1, LAST_STEP + 1):
        assert cf.compute_average(model_with(seen['batch_end', step]['weights']), average) == (step in UPDATES)
        (found,), expected = seen['batch_end', step]['averages'].values(), average.state_dict()
        for key in ('buffers', 'digests', 'num_updates'):
            assert_equal(found[key], expected[key])
    assert average.num_updates == len(UPDATES)


@pytest.mark.parametrize('name', RUNS)
def test_training_is_the_same_with_and_without_an_average(followed, name):
    """On every rank, bit for bit: no evaluation leaves anything of the average in what the next step computes with."""
    for rank, runs in enumerate(followed(name)):
        with_average, without = runs['with'].steps, runs['without'].steps
        assert len(without) == LAST_STEP and with_average.keys() == without.keys()
        for seen in without:
            one, other = with_average[seen]['weights'], without[seen]['weights']
            if name.startswith('ddp') and rank > 0:
                # DDP gives them those of rank 0 before each step, and in a prediction that of whatever is in the model.
                one, other = (without_statistics(weights) for weights in (one, other))
            assert_equal(one, other)


@pytest.mark.parametrize('name', RUNS)
def test_evaluations_and_predictions_see_the_average(followed, name):
    """With rank 0's statistics on every rank; before the first update they see the training weights."""
    averages = followed(name)[0]['with'].steps
    for seen in (rank['with'] for rank in followed(name)):
        for step in (2, 4, 6):
            batch, outputs = seen.evaluations['eval_batch_end', step]
            training = seen.steps['batch_end', step]['weights']
            if step == 2:
                assert close(outputs, predict(training, batch))
            else:
                average = averaged(averages['batch_end', step], RUNS[name].average)
                assert close(outputs, predict({**training, **average}, batch))
                assert not close(outputs, predict(training, batch))
        assert close(seen.predictions[0], seen.evaluations['eval_batch_end', 4][1])


@pytest.mark.parametrize('name', ['ddp', 'fsdp1', 'fsdp2'])
def test_an_average_in_host_memory_is_the_same(followed, name):
    """And where nobody looks for NaNs, an update communicates nothing."""
    for rank, on_the_host in zip(followed(name), run_ranks(follow_on_the_host, 2, name), strict=True):
        assert_equal(on_the_host.steps, rank['with'].steps)
        assert on_the_host.sizes == rank['with'].sizes
        assert on_the_host.communication == [[]] * len(UPDATES)


def without_statistics(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: tensor for n, tensor in weights.items() if not n.startswith('module.1.running')}


def averaged(seen: dict[str, Any], average: str = 'BEMA') -> dict[str, torch.Tensor]:
    """The average of every tensor that has one; the rules of module buffers may keep it in other buffers."""
    (found,) = seen['averages'].values()
    rule = rule_of(average)
    return {
        n: t for name in ('latest', rule.statistics.average, rule.average) for n, t in found['buffers'][name].items()
    }


def rule_of(average: str) -> Rule:
    return make(average)().average.rule


def predict(weights: dict[str, torch.Tensor], batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return model_with(weights).eval()(batch)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether outputs agree but for the order in which sums are taken."""
    return torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', RUNS)
def test_an_update_communicates_one_number(followed, name):
    """Whether all weights are finite is all that the ranks have to agree upon."""
    for rank in followed(name):
        assert rank['with'].communication == [[('allreduce_', 1)]] * len(UPDATES)


@pytest.mark.parametrize('name', RUNS)
def test_a_rank_holds_as_much_of_the_average_as_of_the_parameters(followed, name):
    ranks, rule = followed(name), rule_of(RUNS[name].average)
    for rank in ranks:
        held = rank['with'].sizes
        assert held.keys() == {'parameters', *rule.buffers, *rule.statistics.buffers, 'latest'}
        assert all(held[buffer] == held['parameters'] for buffer in rule.buffers)
    topology = TOPOLOGIES[RUNS[name].topology]
    total = sum(size for rank in ranks for _, size in rank['with'].sizes[rule.average].values())
    whole = sum(parameter.numel() for parameter in make_model().parameters() if parameter.requires_grad)
    assert total == whole * (topology.replicas or (1 if topology.is_sharded else topology.world_size))


@pytest.mark.parametrize('name', RUNS)
def test_the_distance_is_that_of_the_whole_weights(followed, name):
    """And the same on all ranks."""
    steps = followed(name)[0]['with'].steps
    expected = []
    for step in (4, 4, 6, 6):
        seen = steps['batch_end', step]
        average = averaged(seen, RUNS[name].average)
        parameters = [n for n, p in make_model().named_parameters() if p.requires_grad]
        squares = [(average[n].double() - seen['weights'][n].double()).square().sum() for n in parameters]
        expected.append(sum(squares).sqrt().item())
    metric = f'{type(make(RUNS[name].average)()).__name__.lower()}/distance'
    for rank in followed(name):
        assert rank['with'].metrics[metric] == pytest.approx(expected, rel=1e-6)
        assert rank['with'].metrics[metric] == followed(name)[0]['with'].metrics[metric]


def train_on_from_the_average(name: str) -> dict[tuple[str, int], Any]:
    """What is seen after each step, and before the next one."""
    return train(
        TOPOLOGIES[name],
        look=averages_and_weights,
        algorithms=[make(REPLACING)],
        events=['batch_start', 'batch_end'],
        max_duration='6ba',
    )


@pytest.mark.parametrize('name', ['ddp', 'fsdp1', 'fsdp2'])
def test_training_goes_on_from_an_average_on_all_ranks(name):
    """Every rank computes the next step with the mean of the snapshots."""
    first, *others = run_ranks(train_on_from_the_average, 2, name)
    for step in UPDATES:
        seen = first['batch_end', step]
        parameters = [n for n, p in make_model().named_parameters() if p.requires_grad]
        average = averaged(seen, REPLACING)
        assert_equal({n: seen['weights'][n] for n in parameters}, {n: average[n] for n in parameters})
        for rank in (first, *others):
            assert_equal(
                {n: rank['batch_start', step]['weights'][n] for n in parameters}, {n: average[n] for n in parameters}
            )


class Poison(Algorithm):
    """Comes before an average and puts a NaN into the weights of one rank for a step."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank = rank
        self.step = step
        self.kept = torch.empty(0)

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.BATCH_END, Event.BATCH_START) and dist.get_global_rank() == self.rank

    @torch.no_grad()
    def apply(self, event: Event, state: State, logger: Logger) -> None:
        held = [local_tensor(p) for p in named_parameters(state.model).values() if p.requires_grad]
        (last, *_) = [tensor.view(-1) for tensor in reversed(held) if tensor.numel()]
        if event == Event.BATCH_END and state.timestamp.batch == self.step:
            self.kept = last[-1].clone()
            last[-1] = torch.nan
        elif event == Event.BATCH_START and state.timestamp.batch == self.step:
            last[-1] = self.kept


def poison(name: str) -> tuple[str, dict[tuple[str, int], Any]]:
    """What is raised, and what is seen when the update is skipped."""
    algorithms = [functools.partial(Poison, 1, 3), bema()]
    with pytest.raises(FloatingPointError) as error, running(TOPOLOGIES[name], algorithms=algorithms) as trainer:
        trainer.fit()
    seen = train(
        TOPOLOGIES[name],
        look=averages_and_weights,
        algorithms=[functools.partial(Poison, 1, 3), bema(nonfinite='skip')],
        events=['batch_end'],
    )
    return str(error.value), seen


@pytest.mark.parametrize('name', ['ddp', 'fsdp1', 'fsdp2'])
def test_all_ranks_heed_what_one_has_found(name):
    """A NaN in the weights of rank 1, after the step of the first update."""
    ranks = run_ranks(poison, 2, name)
    assert ranks[0][0].startswith('After step 3 a parameter on another rank holds a NaN or an infinity')
    assert ranks[1][0].startswith("After step 3 'module.4.bias' holds a NaN or an infinity")
    for _, seen in ranks:
        counted = [(seen['batch_end', step]['averages']['BEMA'][key]) for step in (3, 5, 8) for key in COUNTERS]
        assert counted == [0, 1, 1, 1, 2, 1]
    average = ranks[0][1]['batch_end', 8]['averages']['BEMA']['buffers']['bema']
    assert all(tensor.isfinite().all() for tensor in average.values())


COUNTERS = ('num_updates', 'num_skipped')


def fail_in_evaluation(name: str) -> dict[str, Any]:
    """What is in the model after an evaluation that failed, and what is seen of the run when it goes on."""
    seen = {'whole': train(TOPOLOGIES[name], look=full_weights, events=['batch_end'], batch_norm=False)}
    for where in ('forward', 'metric'):
        look = Look(full_weights, ['batch_end'])
        with running(
            TOPOLOGIES[name],
            algorithms=[bema()],
            callbacks=[lambda look=look: look],
            eval_dataloader=make_loader(),
            eval_interval='4ba',
            batch_norm=False,
        ) as trainer:
            with failing(trainer, where), pytest.raises(ArithmeticError, match='in the middle'):
                trainer.fit()
            assert trainer.state.algorithms[0].average.swapped  # type: ignore
            if where == 'forward':
                seen['left'] = full_weights(trainer.state)
            trainer.fit()
        seen[where] = look.seen
    return seen


@contextlib.contextmanager
def failing(trainer: Trainer, where: str) -> Iterator[None]:
    """Raises in the second batch of an evaluation: in the middle of a forward pass, or in a metric after one."""
    model, state = trainer._original_model, trainer.state

    def fail(*args: Any) -> None:
        if state.dataloader_label == 'eval' and state.eval_timestamp.batch == 1:
            raise ArithmeticError('in the middle of an evaluation')

    if where == 'metric':
        # The metrics of the training are updated in the same way.
        with mock.patch.object(model, 'update_metric', fail):
            yield
    elif isinstance(state.fsdp_config, FSDPConfig):
        # After an exception in the middle of one FSDP1 itself refuses to go on.
        with model.module.register_forward_pre_hook(fail):
            yield
    else:
        activation = next(module for module in model.modules() if isinstance(module, torch.nn.ReLU))
        with activation.register_forward_hook(fail):
            yield


@pytest.mark.parametrize('name', ['ddp', 'fsdp1', 'fsdp1-grad-op', 'fsdp2', 'fsdp2-grad-op'])
def test_an_evaluation_that_fails_leaves_training_weights_on_every_rank(name):
    """For who looks at them, and for the next step where nobody does."""
    for seen in run_ranks(fail_in_evaluation, 2, name):
        assert_equal(seen['left'], seen['whole']['batch_end', 4])
        assert_equal(seen['forward'], seen['whole'])
        assert_equal(seen['metric'], seen['whole'])


def export(name: str) -> dict[str, Any]:
    """The average as a state dict, also while it is in the model."""
    with running(TOPOLOGIES[name], algorithms=[bema()], tied=True, max_duration='4ba') as trainer:
        trainer.fit()
        average, model = trainer.state.algorithms[0], trainer.state.model
        assert isinstance(average, BEMA)
        seen = {**averages_and_weights(trainer.state), 'exported': average.averaged_state_dict()}
        average.get_bema_model(model)
        seen['exported while swapped'] = average.averaged_state_dict()
        average.get_training_model(model)
        return {**seen, 'weights again': full_weights(trainer.state)}


@pytest.mark.parametrize('name', ['ddp', 'fsdp1', 'fsdp1-hybrid', 'fsdp2'])
def test_rank_0_exports_the_whole_average(name):
    """Tied weights under each of their names, frozen ones as they are; of a sharded model the others get nothing."""
    first, *others = run_ranks(export, TOPOLOGIES[name].world_size, name)
    model = make_model(tied=True)
    expected = {**first['weights'], **averaged(first)}
    expected['module.3.2.weight'] = expected['module.3.0.weight']
    assert_equal(first['exported'], {n: expected[n] for n in first['exported']})
    model.load_state_dict(first['exported'], strict=True)
    for seen in (first, *others):
        assert_equal(seen['exported while swapped'], seen['exported'])
        assert_equal(seen['weights again'], seen['weights'])
    for seen in others:
        assert seen['exported'].keys() == (set() if TOPOLOGIES[name].is_sharded else first['exported'].keys())


class Fused(Topology):
    def parallelism_config(self, dtype: torch.dtype = torch.float32) -> Any:
        return {'fsdp': {**super().parallelism_config(dtype)['fsdp'], 'use_orig_params': False}}  # type: ignore


class TensorParallel(Topology):
    def parallelism_config(self, dtype: torch.dtype = torch.float32) -> Any:
        return {**super().parallelism_config(dtype), 'tp': {'tensor_parallel_degree': 2, 'layer_plan': {}}}  # type: ignore


def refusal(topology: Topology) -> str:
    with pytest.raises(ValueError) as refused, running(topology, algorithms=[bema()]):
        pass
    return str(refused.value)


@pytest.mark.parametrize(
    ('topology', 'message'),
    [
        (Fused(2, 'fsdp1'), 'BEMA cannot average the fused parameters of FSDP: set use_orig_params to True.'),
        (
            TensorParallel(4, 'fsdp1'),
            'BEMA does not support tensor parallelism: leave tp out of the parallelism_config.',
        ),
    ],
)
def test_what_cannot_be_followed_is_refused(topology, message):
    """Before anything is wrapped, on every rank."""
    assert run_ranks(refusal, topology.world_size, topology) == [message] * topology.world_size


def make_adapted_model() -> ComposerClassifier:
    torch.manual_seed(11)
    base = torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.ReLU(), torch.nn.Linear(7, 5))
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=['0', '2']))  # type: ignore
    return ComposerClassifier(adapted, num_classes=5)  # type: ignore


def follow_adapters() -> dict[str, Any]:
    steps, evaluated = Look(averages_and_weights, ['fit_start', 'batch_end']), Look(full_weights, ['eval_batch_end'])
    model, average = make_adapted_model(), bema()()
    with mock.patch('composer.utils.collect_env.get_cpu_model', return_value='CPU'):
        trainer = Trainer(
            model=model,
            optimizers=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02),
            train_dataloader=make_loader(),
            eval_dataloader=make_loader(),
            max_duration='8ba',
            algorithms=[average],
            callbacks=[steps, evaluated],
            progress_bar=False,
            device='cpu',
        )
    trainer.fit()
    trainer.close()
    return {'steps': steps.seen, 'evaluated': evaluated.seen, 'exported': average.averaged_state_dict()}


def test_adapters_are_averaged_and_what_they_adapt_is_left_alone():
    """LoRA through peft, under DDP."""
    model = make_adapted_model()
    adapters = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(adapters) == 4 and all('.lora_' in n for n in adapters)
    for rank in run_ranks(follow_adapters, 2):
        steps = rank['steps']
        model.load_state_dict(steps['batch_end', 1]['weights'])
        average = cf.init_bema(model, update_freq=2)
        for step in (3, 5, 7):
            model.load_state_dict(steps['batch_end', step]['weights'])
            average.update(model, step)
        end = steps['batch_end', 8]
        assert_equal(end['averages']['BEMA']['buffers']['bema'], average.average())
        expected = {**steps['fit_start', 0]['weights'], **end['averages']['BEMA']['buffers']['bema']}
        assert end['averages']['BEMA']['buffers']['bema'].keys() == adapters
        assert_equal(rank['exported'], expected)
        assert_equal(rank['evaluated']['eval_batch_end', 8], expected)
        model.load_state_dict(rank['exported'], strict=True)


def train_by_hand(folder: Path, how: Literal['plain', 'save', 'load']) -> dict[int, Any]:
    """A loop without Composer, over FSDP2: what is seen of the weights and the average at a few steps."""
    dist.initialize_dist('cpu')
    mesh = init_device_mesh('cpu', (dist.get_world_size(),))
    model = make_model(batch_norm=False).module
    for unit in (*model[2:], model):
        fully_shard(unit, mesh=mesh)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    average = None if how == 'plain' else cf.init_bema(model, update_freq=2)
    seen: dict[int, Any] = {}

    def look(step: int) -> None:
        seen[step] = {'weights': {n: in_full(tensor) for n, tensor in model.state_dict().items()}}
        if average is not None:
            seen[step]['average'] = copy.deepcopy(unpack_entry(pack_entry(average.state_dict(), as_shards=False)))

    loaded = 0
    if how == 'load':
        assert average is not None, 'there is one to load'
        # Memory to load into; the average's is its own.
        checkpoint = {'model': get_model_state_dict(model), 'average': average.state_dict()}
        dcp.load(checkpoint, checkpoint_id=folder)
        set_model_state_dict(model, checkpoint['model'])
        average.load_state_dict(checkpoint['average'], model)
        loaded = average.step
        look(loaded)
    for step, (inputs, targets) in enumerate(make_loader().dataloader, start=1):
        if step <= loaded:
            continue
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            cf.compute_bema(model, average)
            with average.applied_to(model), torch.no_grad():
                model(inputs)
        if step in (5, 8):
            look(step)
        if step == 5 and how == 'save':
            dcp.save({'model': get_model_state_dict(model), 'average': average.state_dict()}, checkpoint_id=folder)
    return seen


def test_the_functional_face_in_a_loop_by_hand(tmp_path):
    """Averaging changes nothing of the training, and what was saved goes on with any number of ranks."""
    plain = run_ranks(train_by_hand, 2, tmp_path, 'plain')
    saved = run_ranks(train_by_hand, 2, tmp_path, 'save')
    for rank, without in zip(saved, plain, strict=True):
        for step in (5, 8):
            assert_equal(rank[step]['weights'], without[step]['weights'])
    assert_equal(run_ranks(train_by_hand, 2, tmp_path, 'load'), saved)
    assert_equal(run_ranks(train_by_hand, 4, tmp_path, 'load')[0][5], saved[0][5])
