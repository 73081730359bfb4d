# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What the loggers of a run get: the settings of its averages once, and their numbers as they come."""

import re
from pathlib import Path

import pytest
from composer.loggers import FileLogger, InMemoryLogger, LoggerDestination, TensorboardLogger

from composer_bema import BEMA, EMA
from tests.algorithms.runs import make_evaluator, make_trainer

METRICS = {'bema/alpha', 'bema/beta', 'bema/num_updates', 'bema/distance'}
SETTINGS = {
    'bema/update_freq': '2ba',
    'bema/update_after': '0ba',
    'bema/half_life': None,
    'bema/ema_power': 0.5,
    'bema/bias_power': 0.2,
    'bema/lag': 10,
    'bema/multiplier': 1.0,
    'bema/min_ema_multiplier': 0.0,
    'bema/update_ref_model': None,
    'bema/ref_model_update_freq': None,
    'bema/ref_model_update_after': None,
    'bema/average_buffers': True,
    'bema/eval_labels': ['eval'],
    'bema/save_weights': 'average',
    'bema/state_in_checkpoint': True,
    'bema/nonfinite': 'raise',
    'bema/device': 'cpu',
}


def fit(*loggers: LoggerDestination) -> None:
    """Four steps with two updates and an evaluation of the average."""
    trainer = make_trainer(
        BEMA('2ba', eval_labels=['eval'], device='cpu'),
        max_duration='4ba',
        loggers=list(loggers),
        eval_dataloader=[make_evaluator('eval')],
        eval_interval='4ba',
    )
    trainer.fit()
    trainer.close()


class Settings(InMemoryLogger):
    """Keeps each call."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def log_hyperparameters(self, hyperparameters):
        self.calls.append(dict(hyperparameters))


def test_settings_are_logged_once():
    logger = Settings()
    fit(logger)
    assert [call for call in logger.calls if any(name.startswith('bema/') for name in call)] == [SETTINGS]


def test_every_average_logs_its_own():
    logger = Settings()
    averages = BEMA('2ba', eval_labels=['one']), EMA('10ba', eval_labels=['two'])
    make_trainer(*averages, max_duration='4ba', loggers=[logger]).close()
    logged = {name: value for call in logger.calls for name, value in call.items()}
    assert (logged['bema/half_life'], logged['ema/half_life']) == (None, '10ba')
    # Neither of two averages is the checkpoint's model unless one is told to be.
    assert logged['bema/save_weights'] == logged['ema/save_weights'] == 'training'


def test_the_file_logger_has_it_all(tmp_path: Path):
    fit(FileLogger(str(tmp_path / 'log.txt')))
    text = (tmp_path / 'log.txt').read_text()
    metrics = re.findall(r'^\[metric\]\[batch=(\d+)\]: (bema/\w+): (\S+)', text, re.MULTILINE)
    assert {name for _, name, _ in metrics} == METRICS
    beta = [(int(step), float(value)) for step, name, value in metrics if name == 'bema/beta']
    # What a step logs at its end has the number of the step that was counted.
    assert beta == [(2, pytest.approx(12**-0.5, abs=1e-3)), (4, pytest.approx(14**-0.5, abs=1e-3))]
    assert {name for name in SETTINGS if f'[hyperparameter]: {name}: ' in text} == {*SETTINGS}


def test_tensorboard_has_it_all(tmp_path: Path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    fit(TensorboardLogger(log_dir=str(tmp_path)))
    scalars, settings = {}, {}
    for folder in {path.parent for path in tmp_path.rglob('events.*')}:
        events = EventAccumulator(str(folder)).Reload()
        scalars |= {tag: events.Scalars(tag) for tag in events.Tags()['scalars']}
        for content in events.summary_metadata.values():
            settings |= HParamsPluginData.FromString(content.plugin_data.content).session_start_info.hparams
    assert not METRICS - {*scalars}
    beta = [(event.step, event.value) for event in scalars['bema/beta']]
    assert beta == [(2, pytest.approx(12**-0.5)), (4, pytest.approx(14**-0.5))]
    assert not {*SETTINGS} - {*settings}
