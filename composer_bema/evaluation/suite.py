# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Tasks, ready to be measured on any number of models."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from composer_bema.evaluation.harness import Generation, Questions
from composer_bema.evaluation.language_models import Backend, require_harness
from composer_bema.evaluation.loss import LOSS, measure_loss
from composer_bema.evaluation.measurements import Measurement
from composer_bema.evaluation.tasks import QUESTION_TASKS, Protocol

__all__ = ['Batches', 'Measure', 'Suite', 'Texts']

Batches = Iterable[Mapping[str, torch.Tensor]]
Measure = Callable[[PreTrainedModel], tuple[list[Measurement], list[Generation]]]


class Texts(typing.Protocol):
    """Texts of which the loss is measured."""

    @property
    def given(self) -> Mapping[str, Any]:
        """What they are, as plain values."""
        ...

    def __call__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Mapping[str, Batches]:
        """Returns them in the tokens of a tokenizer, cut for a model, by their names; see `measure_loss`.

        Each can be gone through again and again.
        """
        ...


@dataclass(frozen=True)
class Suite:
    """Tasks, and how they are done.

    Args:
        tasks (Sequence[str]): ``'loss'``, and keys of `QUESTION_TASKS`.
        protocol (Protocol): How questions are asked.
        texts (Texts, optional): Those of which ``'loss'`` is measured.
        files (Mapping[str, str | Path]): JSONL files with the questions of tasks. Default: the hub's.
        chat (bool, optional): Whether prompts go through a chat template. Default: if the tokenizer has one.
        backend (str): ``'hf'`` or ``'vllm'``.
        batch_size (int): Sequences that are generated at a time. Default: ``16``.

    Raises:
        ImportError: If questions are to be asked and the harness is not installed.
        ValueError: If a task is unknown, there twice, or lacks its texts, or a file belongs to none.
    """

    tasks: Sequence[str]
    protocol: Protocol = field(default_factory=Protocol)
    texts: Optional[Texts] = None
    files: Mapping[str, Union[str, Path]] = field(default_factory=dict)
    chat: Optional[bool] = None
    backend: Backend = 'hf'
    batch_size: int = 16

    def __post_init__(self) -> None:
        known = (LOSS, *QUESTION_TASKS)
        if not self.tasks:
            raise ValueError(f'Name a task: {", ".join(known)}.')
        for task in self.tasks:
            if task not in known:
                raise ValueError(f"There is no task '{task}', but {', '.join(known)}.")
            if self.tasks.count(task) > 1:
                raise ValueError(f"The task '{task}' is there twice.")
        other = next((task for task in self.files if task not in self.questions), None)
        if other is not None:
            raise ValueError(f"There are questions of '{other}', which is none of the tasks {', '.join(self.tasks)}.")
        if LOSS in self.tasks and self.texts is None:
            raise ValueError("The task 'loss' needs texts.")
        if self.questions:
            require_harness(self.backend)

    @property
    def questions(self) -> list[str]:
        """The tasks that ask questions."""
        return [task for task in self.tasks if task != LOSS]

    def described(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Returns how the tasks are done for models of a tokenizer, as plain values."""
        described: dict[str, Any] = {}
        if self.texts is not None and LOSS in self.tasks:
            described['texts'] = dict(self.texts.given)
        if self.questions:
            described |= dataclasses.asdict(self.protocol) | {'samples': self.protocol.answers}
            described['files'] = {task: str(file) for task, file in self.files.items()}
            described |= {'chat': self._asks_in_chat(tokenizer), 'backend': self.backend}
        return described

    def prepare(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Measure:
        """Reads the texts and questions, and returns what measures a model and tells what it has generated.

        Args:
            tokenizer (PreTrainedTokenizerBase): The models'.
            model (PreTrainedModel): One like those that are measured, for its context.

        Raises:
            ValueError: If texts or questions cannot be read, or do not suit such a model.
        """
        texts = self.texts(tokenizer, model) if self.texts is not None and LOSS in self.tasks else {}
        questions = None
        if self.questions:
            questions = Questions(
                self.questions,
                self.protocol,
                tokenizer,
                chat=self._asks_in_chat(tokenizer),
                files=self.files,
                backend=self.backend,
                batch_size=self.batch_size,
            )
            questions.require_room(model)

        def measure(model: PreTrainedModel) -> tuple[list[Measurement], list[Generation]]:
            measurements = [
                m for name, batches in texts.items() for m in measure_loss(f'{LOSS}-{name}', model, batches)
            ]
            asked, generations = questions.ask(model) if questions is not None else ([], [])
            return measurements + asked, generations

        return measure

    def _asks_in_chat(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        return tokenizer.chat_template is not None if self.chat is None else self.chat
