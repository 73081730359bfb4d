# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What is evaluated: one model, or averages of a directory of checkpoints, each in the same model in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from composer_bema.formats.composer import AVERAGE, TRAINING, Checkpoint, open_checkpoint
from composer_bema.formats.foreign_code import ForeignCodeError, no_foreign_code
from composer_bema.formats.harmless import refuse_named_code, refuse_named_model
from composer_bema.formats.pretrained import (
    ADAPTER_CONFIG,
    CONFIG,
    Pretrained,
    find_pretrained,
    is_pretrained,
    read_config,
)
from composer_bema.formats.tensors import dtype_named
from composer_bema.offline.checkpoints import Source
from composer_bema.offline.export import export
from composer_bema.offline.loading import load_weights
from composer_bema.offline.plan import Average
from composer_bema.offline.settings import Setting
from composer_bema.offline.sweep import averaged_weights
from composer_bema.offline.trajectory import Trajectory

__all__ = ['Averages', 'OneModel', 'Subject', 'Target', 'open_target']


@dataclass(frozen=True)
class Subject:
    """Weights that are evaluated.

    Args:
        weights (str): What they are, such as ``'bema bias_power=0.4'``.
        step (int, optional): The optimizer steps that they have seen; None where nothing says it.
        settings (Mapping[str, Any]): The rule of an average and its settings.
    """

    weights: str
    step: Optional[int] = None
    settings: Mapping[str, Any] = field(default_factory=dict)


class OneModel:
    """A Hugging Face folder, a model on the hub, or a Composer checkpoint; its ``model`` and ``tokenizer``.

    Args:
        target (str): Its path or name.
        weights (str, optional): Of a Composer checkpoint, see :func:`.export`. Default: the average.
        average (str, optional): Which average, by its class, where a run had several.
        dtype (str, optional): What the model is held in. Default: what it is stored in.
        tokenizer (str, optional): The folder or name of its tokenizer. Default: its own.
        device (torch.device): Where the model is put.

    Attributes:
        model (PreTrainedModel): The model.
        tokenizer (PreTrainedTokenizerBase): Its tokenizer.
        given (Mapping[str, Any]): What was asked for.
    """

    def __init__(
        self,
        target: str,
        *,
        weights: Optional[str] = None,
        average: Optional[str] = None,
        dtype: Optional[str] = None,
        tokenizer: Optional[str] = None,
        device: torch.device,
    ) -> None:
        self.given = {'target': target, 'weights': weights, 'average': average, 'tokenizer': tokenizer}
        if _is_composer(target):
            self._subject = Subject(weights or AVERAGE, open_checkpoint(target).batch)
            self.model, self.tokenizer = _load_exported(target, self._subject.weights, average, dtype, tokenizer)
        elif weights or average:
            raise ValueError(
                f"'{target}' is no checkpoint of Composer and has one set of weights: leave the choice out."
            )
        else:
            self._subject = Subject(target)
            self.model, self.tokenizer = _load(find_pretrained(target), dtype, tokenizer)
        self.model.to(device)

    def models(self) -> Iterator[tuple[Subject, PreTrainedModel]]:
        """Yields the model."""
        yield self._subject, self.model


class Averages:
    """Averages of a directory of checkpoints, in one reading: they are held in memory, and loaded one after another.

    They are put into ``model``, which before holds the last checkpoint's weights, and have its ``tokenizer``.

    Args:
        checkpoints (str): The directory.
        settings (Mapping[str, Setting]): The averages, by what they are called.
        at (Sequence[int]): The steps at which they are taken. Default: the last update of each.
        every_update (bool): Whether they are taken at all of their updates.
        initial_model (str, optional): See :class:`.Trajectory`.
        weights (str): See :class:`.Trajectory`. Default: ``'training'``.
        dtype (str, optional): What averages are held in. Default: the checkpoints' dtype.
        tokenizer (str, optional): The folder or name of the tokenizer. Default: the last checkpoint's.
        device (torch.device): Where the model is put.

    Attributes:
        model (PreTrainedModel): The model, which holds one average after another.
        tokenizer (PreTrainedTokenizerBase): Its tokenizer.
        given (Mapping[str, Any]): What was asked for.
    """

    def __init__(
        self,
        checkpoints: str,
        settings: Mapping[str, Setting],
        *,
        at: Sequence[int] = (),
        every_update: bool = False,
        initial_model: Optional[str] = None,
        weights: str = TRAINING,
        dtype: Optional[str] = None,
        tokenizer: Optional[str] = None,
        device: torch.device,
    ) -> None:
        self.given = {'target': checkpoints, 'averages': list(settings), 'at': list(at), 'every_update': every_update}
        self.given |= {'initial_model': initial_model, 'weights': weights, 'tokenizer': tokenizer}
        self._dtype = dtype_named(dtype, 'dtype')
        self._trajectory = Trajectory(checkpoints, initial_model=initial_model, weights=weights)
        self._averages: list[tuple[str, Average]] = []
        for name, setting in settings.items():
            steps = _updates(self._trajectory, setting) if every_update else at
            self._averages += [(name, average) for average in self._trajectory.plan(setting, steps)]
        last = self._trajectory.open([average for _, average in self._averages]).sources[-1]
        self.model, self.tokenizer = _load_like(last, weights, dtype, tokenizer)
        self.model.to(device)

    def models(self) -> Iterator[tuple[Subject, PreTrainedModel]]:
        """Yields the model with each of the averages in it; the weights before are gone then."""
        averages = [average for _, average in self._averages]
        computed = averaged_weights(self._trajectory, averages, dtype=self._dtype, show_progress=True)
        for name, average in self._averages:
            # Nothing else may hold an average that is in the model already.
            load_weights(self.model, next(computed)[1])
            setting = average.setting
            yield Subject(name, average.step, {'rule': setting.rule, **setting.given}), self.model


Target = Union[OneModel, Averages]


def open_target(target: str, settings: Mapping[str, Setting], **options: Any) -> Target:
    """Opens what is to be evaluated.

    Args:
        target (str): A Hugging Face folder or name, a Composer checkpoint, or with settings a directory of checkpoints.
        settings (Mapping[str, Setting]): Averages of the latter.
        options: Those of :class:`OneModel` or :class:`Averages`.

    Raises:
        FileNotFoundError: If there is no such target.
        ValueError: If it is of another kind, is damaged, or has no tokenizer.
    """
    if settings:
        return Averages(target, settings, **options)
    folder = Path(target)
    if folder.is_dir() and not is_pretrained(folder) and not _is_composer(target):
        raise ValueError(
            f"'{target}' is neither a Hugging Face folder nor a checkpoint of Composer; averages of a directory of "
            'checkpoints need --rule.'
        )
    return OneModel(target, **options)


def _is_composer(target: str) -> bool:
    path = Path(target)
    return path.is_file() or (path.is_dir() and (path / '.metadata').is_file())


def _updates(trajectory: Trajectory, setting: Setting) -> list[int]:
    """Returns the steps of all updates of an average."""
    freq, start = setting.update_freq or 1, setting.update_after
    return [step for step in trajectory.steps if step > start and (step - start) % freq == 0]


def _load_like(source: Source, weights: str, dtype: Optional[str], tokenizer: Optional[str]) -> Any:
    if isinstance(source.model, Checkpoint):
        return _load_exported(str(source.path), weights, None, dtype, tokenizer)
    if isinstance(source.model, Pretrained):
        return _load(source.path, dtype, tokenizer)
    raise ValueError(f"'{source.path}' has weights alone, and does not say of what model: give Hugging Face folders.")


def _load_exported(
    checkpoint: str, weights: str, average: Optional[str], dtype: Optional[str], tokenizer: Optional[str]
) -> Any:
    with tempfile.TemporaryDirectory(prefix='composer-bema-export-') as parent:
        folder = Path(parent) / 'model'
        export(checkpoint, folder, weights=weights, average=average)
        return _load(folder, dtype, tokenizer)


def _load(folder: Path, dtype: Optional[str], tokenizer: Optional[str]) -> tuple[Any, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM

    model_class: Any = AutoModelForCausalLM
    if (folder / ADAPTER_CONFIG).is_file():
        try:
            from peft import AutoPeftModelForCausalLM
        except ImportError as error:
            raise ImportError(
                f"'{folder}' holds an adapter, and peft is not installed: pip install 'composer_bema[peft]'."
            ) from error
        model_class = AutoPeftModelForCausalLM
    _require_no_named_code(folder)
    torch_dtype = dtype_named(dtype, 'dtype') or 'auto'
    with no_foreign_code(str(folder)):
        model = model_class.from_pretrained(folder, torch_dtype=torch_dtype, trust_remote_code=False)
    return model, _load_tokenizer(tokenizer or str(folder))


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        with no_foreign_code(name):
            return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except ForeignCodeError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"There is no tokenizer in '{name}': name one with --tokenizer.") from error


def _require_no_named_code(folder: Path) -> None:
    """Checks the configurations that a model is loaded by: its own, an adapter's, and that of the adapter's base."""
    for path in (folder / CONFIG, folder / ADAPTER_CONFIG):
        if path.is_file():
            config = read_config(path)
            _refuse_foreign(config, str(path))
            if path.name == CONFIG:
                # It may have another file read in its place.
                _refuse_foreign(PretrainedConfig.get_config_dict(folder)[0], str(path))
            base = config.get('base_model_name_or_path')
            if path.name == ADAPTER_CONFIG and base:
                _require_no_named_code_in_base(str(base), config.get('revision'))


def _require_no_named_code_in_base(base: str, revision: Optional[str]) -> None:
    """Checks the configuration of an adapter's base, at the revision at which PEFT loads it."""
    # It would be made, too, on a base that its own configuration names.
    if find_adapter_config_file(base, revision=revision) is not None:
        raise ValueError(f"The base model '{base}' of the adapter holds an adapter itself: merge that into its base.")
    config, _ = PretrainedConfig.get_config_dict(base, revision=revision)
    _refuse_foreign(config, base)


def _refuse_foreign(config: Mapping[str, Any], source: str) -> None:
    refuse_named_code(config, source)
    refuse_named_model(config, source)
