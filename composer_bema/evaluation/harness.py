# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Models on questions, through the lm-evaluation-harness."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from composer_bema.evaluation.language_models import (
    Backend,
    LanguageModel,
    language_model,
    max_length_of,
    require_harness,
    without_end,
)
from composer_bema.evaluation.measurements import Measurement, mean_over
from composer_bema.evaluation.tasks import SYSTEM_PROMPT, Protocol, task_configs

__all__ = ['Generation', 'Questions']

log = logging.getLogger(__name__)

# What the harness calls a metric in its samples, and what it is called here.
_METRICS = {'acc': 'accuracy', 'no_answer': 'no answer'}


class Generation(NamedTuple):
    """What a model has answered to one question: its texts, and the part of them that is right."""

    task: str
    question: int
    prompt: str
    target: str
    answers: list[str]
    accuracy: float


class Questions:
    """Tasks whose questions have been read, and can be asked of any number of models.

    Args:
        tasks (Sequence[str]): Keys of `QUESTION_TASKS`.
        protocol (Protocol): How they are asked.
        tokenizer (PreTrainedTokenizerBase): The models'.
        chat (bool): Whether prompts go through its chat template. Default: ``False``.
        files (Mapping[str, str | Path]): JSONL files with the questions of tasks. Default: the hub's.
        backend (str): ``'hf'`` generates in this process; ``'vllm'`` reads each model from a temporary folder.
        batch_size (int): Sequences that the former generates at a time. Default: ``16``.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If the harness, or the backend, is not installed.
        ValueError: If a task or setting is unknown, or questions cannot be read.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        protocol: Protocol,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat: bool = False,
        files: Optional[Mapping[str, Union[str, Path]]] = None,
        backend: Backend = 'hf',
        batch_size: int = 16,
    ) -> None:
        require_harness(backend)
        if tokenizer.eos_token_id is None:
            raise ValueError('The tokenizer has no end-of-text token, which questions need: name one with --tokenizer.')
        if chat and tokenizer.chat_template is None:
            raise ValueError('The tokenizer has no chat template: leave out --chat-template.')
        self._chat = chat
        self._system = SYSTEM_PROMPT if self._chat and _takes_system_prompt(tokenizer) else None
        self._protocol = protocol
        self._tokenizer = without_end(tokenizer)
        self._backend: Backend = backend
        self._batch_size = batch_size
        self._manager = _task_manager()
        self._sets = {task: self._read(task, (files or {}).get(task)) for task in tasks}

    def require_room(self, model: PreTrainedModel) -> None:
        """Checks that the context of a model has room for the longest answer and a question.

        Raises:
            ValueError: If it has not.
        """
        longest = max(_max_new_tokens(task) for sets in self._sets.values() for task in sets.values())
        context = max_length_of(model, self._tokenizer)
        if longest >= context:
            raise ValueError(
                f'An answer may have {longest} tokens, but the context of the model only {context}: take '
                'log-likelihood, or loss.'
            )

    def ask(self, model: PreTrainedModel) -> tuple[list[Measurement], list[Generation]]:
        """Returns the accuracies of a model, and what it has generated.

        Every model gets the same random numbers. Accuracies are means over questions, each of which counts as the part
        of its answers that are right.

        Raises:
            ValueError: If the longest answer leaves no room for a question in the model's context.
        """
        from lm_eval import evaluator

        # Its decorator hides its arguments from type checkers.
        simple_evaluate: Any = evaluator.simple_evaluate
        self.require_room(model)
        measurements, generations = [], []
        with language_model(model, self._tokenizer, self._backend, self._batch_size, self._protocol.seed) as lm:
            for task, sets in self._sets.items():
                with _quiet():
                    results = simple_evaluate(
                        model=lm,
                        tasks=[*sets.values()],
                        task_manager=self._manager,
                        apply_chat_template=self._chat,
                        system_instruction=self._system,
                        fewshot_as_multiturn=self._chat,
                        torch_random_seed=self._protocol.seed,
                        bootstrap_iters=0,
                    )
                samples = results['samples']
                self._warn_of_cut_questions(task, samples, lm)
                measurements += _accuracies(task, samples)
                generations += [_generation(name, sample) for name, rows in samples.items() for sample in rows]
        return measurements, generations

    def _read(self, task: str, file: Optional[Union[str, Path]]) -> dict[str, Any]:
        from datasets.exceptions import DatasetsError

        configs = task_configs(task, self._protocol, chat=self._chat, file=file)
        try:
            return self._manager.load([*configs.values()])['tasks']
        except (OSError, TypeError, DatasetsError) as error:
            source = file or next(iter(configs.values()))['dataset_path']
            reason = str(error.__cause__ or error).rstrip('.')
            raise ValueError(f"The questions of {task} could not be read from '{source}': {reason}.") from error

    def _warn_of_cut_questions(self, task: str, samples: Mapping[str, Sequence[Any]], lm: LanguageModel) -> None:
        cut, asked = 0, 0
        for name, rows in samples.items():
            room = lm.max_length - _max_new_tokens(self._sets[task][name])
            cut += sum(len(lm.tok_encode(row['arguments'][0][0])) > room for row in rows)
            asked += len(rows)
        if cut:
            log.warning(
                '%d of the %d questions of %s do not fit into the %d tokens of the context, and lost their beginning.',
                cut,
                asked,
                task,
                lm.max_length,
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the harness from saying for each question what is said once here, or does not concern a model in memory."""
    logger = logging.getLogger('lm_eval')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _task_manager() -> Any:
    from lm_eval.tasks import TaskManager

    # It would look through the thousands of files that the harness's own tasks have.
    return TaskManager(include_defaults=False)


def _takes_system_prompt(tokenizer: PreTrainedTokenizerBase) -> bool:
    from jinja2.exceptions import TemplateError

    turns = [{'role': role, 'content': 'x'} for role in ('system', 'user')]
    try:
        tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError as error:
        # Gemma's refuses it, for one.
        log.info('The chat template takes no system prompt (%s), and gets none.', error)
        return False
    return True


def _max_new_tokens(task: Any) -> int:
    return (task.config.generation_kwargs or {}).get('max_gen_toks', 0)


def _accuracies(task: str, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Measurement]:
    """Returns the means over the questions of a task, and over those of each of its sets where it has several."""
    every = [sample for rows in samples.values() for sample in rows]
    groups = {task: every} | (dict(samples) if len(samples) > 1 else {})
    return [
        mean_over(name, title, [float(sample[metric]) for sample in rows])
        for name, rows in groups.items()
        for metric, title in _METRICS.items()
        if metric in rows[0]
    ]


def _generation(task: str, sample: Mapping[str, Any]) -> Generation:
    answers = sample['filtered_resps'][0]
    # By log-likelihood nothing is generated.
    texts = answers if isinstance(answers, list) else []
    return Generation(task, sample['doc_id'], sample['arguments'][0][0], str(sample['target']), texts, sample['acc'])
