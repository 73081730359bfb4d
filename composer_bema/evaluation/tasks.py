# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Questions with short answers, as task configurations of the lm-evaluation-harness.

The protocol is the paper's: fixed questions of each set, chosen by a seed, 50 answers to each at temperature 1, and the
part of the right ones averaged over questions. The wording of the prompts is ours, and so is what counts as an answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Optional, Union, get_args

import numpy as np

from composer_bema.evaluation.answers import find_letter, find_number, find_yes_or_no

__all__ = ['QUESTION_TASKS', 'SYSTEM_PROMPT', 'Mode', 'Protocol', 'task_configs']

Mode = Literal['sample', 'greedy', 'log-likelihood']

SYSTEM_PROMPT = 'You are a helpful assistant.'
LETTERS = 'ABCD'
HIGH_SCHOOL_SUBJECTS = (
    'biology',
    'chemistry',
    'computer_science',
    'european_history',
    'geography',
    'government_and_politics',
    'macroeconomics',
    'mathematics',
    'microeconomics',
    'physics',
    'psychology',
    'statistics',
    'us_history',
    'world_history',
)

Row = Mapping[str, Any]

_DESCRIBED = {bool: 'true or false', int: 'the number of a choice from 0 on', str: 'a text', list: 'a list of choices'}


@dataclass(frozen=True)
class Protocol:
    """How questions are asked.

    Args:
        mode (str): ``'sample'`` draws answers at temperature 1, ``'greedy'`` takes the likeliest token each time, and
            ``'log-likelihood'`` compares the choices, where there are some, and generates nothing.
        samples (int): The answers that are drawn to each question. Default: ``50``.
        questions (int, optional): The questions of each set. Default: the paper's 64, and 128 of GSM8K.
        few_shot (int): The answered questions that precede each. Default: ``0``.
        chain_of_thought (bool): Whether to ask for steps first; GSM8K always does. Default: ``False``.
        seed (int): Of the choice of questions, and of the answers that are drawn. Default: the paper's.

    Raises:
        ValueError: If a setting is out of its range.
    """

    mode: Mode = 'sample'
    samples: int = 50
    questions: Optional[int] = None
    few_shot: int = 0
    chain_of_thought: bool = False
    seed: int = 37371

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f'mode must be one of {", ".join(get_args(Mode))}, not {self.mode!r}.')
        for name, least in (('samples', 1), ('questions', 1), ('few_shot', 0), ('seed', 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f'{name} must be a whole number, at least {least}, not {value!r}.')
        if self.seed >= 2**32:
            raise ValueError(f'seed must be less than 2**32, not {self.seed}.')
        if self.chain_of_thought and self.mode == 'log-likelihood':
            raise ValueError('With log-likelihood nothing is generated, so that there is no chain of thought.')

    @property
    def answers(self) -> int:
        """The texts that are generated for each question."""
        return {'sample': self.samples, 'greedy': 1, 'log-likelihood': 0}[self.mode]


@dataclass(frozen=True)
class QuestionSet:
    """A data set of questions.

    Args:
        path (str): Its name on the hub.
        name (str): Its configuration there.
        split (str): The split that is asked.
        columns (Mapping[str, type]): Those that are read, and what they hold.
        questions (int): The number of questions that the paper asks.
        max_new_tokens (int): The length of an answer.
        ask (Callable): Returns the prompt of a row; its second argument says whether to ask for steps.
        target (Callable): Returns the right answer as it should be written.
        is_right (Callable): Returns whether a text answers a row rightly; None where it gives no answer.
        choices (tuple[str, ...]): What log-likelihoods compare; none where answers are free.
        choice (Callable): Returns the index of the right one.
        subject (str, optional): The value of the column ``subject`` of the rows that are asked. Default: all.
    """

    path: str
    name: str
    split: str
    columns: Mapping[str, type]
    questions: int
    max_new_tokens: int
    ask: Callable[[Row, bool], str]
    target: Callable[[Row], str]
    is_right: Callable[[str, Row], Optional[bool]]
    choices: tuple[str, ...] = ()
    choice: Optional[Callable[[Row], int]] = None
    subject: Optional[str] = None


def _ask_boolq(row: Row, steps: bool) -> str:
    think = 'Think step by step, and then end' if steps else 'End'
    return (
        f'Read the passage and answer the question about it with yes or no. {think} your response with "Answer: yes" '
        f'or "Answer: no".\n\nPassage: {row["passage"].strip()}\n\nQuestion: {row["question"].strip().rstrip("?")}?'
    )


def _boolq_is_right(text: str, row: Row) -> Optional[bool]:
    answer = find_yes_or_no(text)
    return None if answer is None else answer == row['answer']


def _ask_gsm8k(row: Row, steps: bool) -> str:
    del steps
    return (
        'Solve the problem step by step, and end your response with four number signs and the result, as in '
        f'"#### 42".\n\nQuestion: {row["question"].strip()}'
    )


def _solution(row: Row) -> str:
    # Without what the data set's authors have noted for a calculator: 48/2 = <<48/2=24>>24.
    return re.sub('<<.*?>>', '', row['answer'])


def _gsm8k_is_right(text: str, row: Row) -> Optional[bool]:
    number = find_number(text)
    return None if number is None else number == find_number(row['answer'])


def _ask_mmlu(row: Row, steps: bool) -> str:
    think = 'Think step by step, and then end' if steps else 'End'
    choices = '\n'.join(f'{letter}. {choice}' for letter, choice in zip(LETTERS, row['choices'], strict=True))
    return (
        f'Answer the question by choosing one of four. {think} your response with its letter, as in "Answer: A".\n\n'
        f'Question: {row["question"].strip()}\n{choices}'
    )


def _mmlu_is_right(text: str, row: Row) -> Optional[bool]:
    letter = find_letter(text, LETTERS)
    return None if letter is None else letter == LETTERS[row['answer']]


_BOOLQ = QuestionSet(
    path='google/boolq',
    name='default',
    split='validation',
    columns={'question': str, 'passage': str, 'answer': bool},
    questions=64,
    max_new_tokens=256,
    ask=_ask_boolq,
    target=lambda row: f'Answer: {"yes" if row["answer"] else "no"}',
    is_right=_boolq_is_right,
    choices=('Answer: no', 'Answer: yes'),
    choice=lambda row: int(row['answer']),
)
_GSM8K = QuestionSet(
    path='openai/gsm8k',
    name='main',
    split='test',
    columns={'question': str, 'answer': str},
    questions=128,
    max_new_tokens=512,
    ask=_ask_gsm8k,
    target=_solution,
    is_right=_gsm8k_is_right,
)


def _high_school(subject: str) -> QuestionSet:
    return QuestionSet(
        path='cais/mmlu',
        name='all',
        split='test',
        columns={'question': str, 'choices': list, 'answer': int, 'subject': str},
        questions=64,
        max_new_tokens=256,
        ask=_ask_mmlu,
        target=lambda row: f'Answer: {LETTERS[row["answer"]]}',
        is_right=_mmlu_is_right,
        choices=tuple(f'Answer: {letter}' for letter in LETTERS),
        choice=lambda row: row['answer'],
        subject=f'high_school_{subject}',
    )


# A task is one set of questions, or several that count together.
QUESTION_TASKS: dict[str, dict[str, QuestionSet]] = {
    'boolq': {'boolq': _BOOLQ},
    'gsm8k': {'gsm8k': _GSM8K},
    'mmlu_hs': {f'mmlu_hs_{subject}': _high_school(subject) for subject in HIGH_SCHOOL_SUBJECTS},
}


def task_configs(
    task: str, protocol: Protocol, *, chat: bool, file: Optional[Union[str, Path]] = None
) -> dict[str, dict[str, Any]]:
    """Returns the configurations of a task for the harness, by the names of its sets of questions.

    Args:
        task (str): A key of `QUESTION_TASKS`.
        protocol (Protocol): How its questions are asked.
        chat (bool): Whether prompts go through the chat template of the tokenizer.
        file (str | Path, optional): A JSONL file with rows like the data set's. Default: that of the hub.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is no such task, or it has no choices to compare, or the file is empty.
    """
    if task not in QUESTION_TASKS:
        raise ValueError(f"There is no task '{task}', but loss, {', '.join(QUESTION_TASKS)}.")
    if file is not None and not Path(file).is_file():
        raise FileNotFoundError(f"There is no file '{file}' with the questions of {task}.")
    if file is not None and not Path(file).read_bytes().strip():
        raise ValueError(f"The file '{file}' is empty, and should have the questions of {task}, a JSON object a line.")
    return {name: _config(name, questions, protocol, chat, file) for name, questions in QUESTION_TASKS[task].items()}


def _config(
    name: str, questions: QuestionSet, protocol: Protocol, chat: bool, file: Optional[Union[str, Path]]
) -> dict[str, Any]:
    if protocol.mode == 'log-likelihood' and not questions.choices:
        raise ValueError(
            f"The answers of {name} are free, so that log-likelihood has nothing to compare: take 'greedy'."
        )
    data = {'dataset_path': questions.path, 'dataset_name': questions.name}
    if file is not None:
        # What is said of the questions is said of the file, then.
        questions = replace(questions, path=str(file))
        data = {'dataset_path': 'json', 'dataset_kwargs': {'data_files': {questions.split: str(file)}}}
    steps = protocol.chain_of_thought
    return {
        'task': name,
        **data,
        'test_split': questions.split,
        'process_docs': partial(_chosen, questions=questions, protocol=protocol),
        'doc_to_text': partial(_prompt, questions=questions, steps=steps, chat=chat),
        'target_delimiter': '' if chat else ' ',
        'num_fewshot': protocol.few_shot,
        'fewshot_config': {
            'split': questions.split,
            'process_docs': partial(_examples, questions=questions, protocol=protocol),
            'sampler': 'first_n',
        },
        **(_compared(questions) if protocol.mode == 'log-likelihood' else _generated(questions, protocol, chat)),
    }


def _compared(questions: QuestionSet) -> dict[str, Any]:
    return {
        'output_type': 'multiple_choice',
        'doc_to_choice': list(questions.choices),
        'doc_to_target': questions.choice,
        'metric_list': [{'metric': 'acc', 'aggregation': 'mean', 'higher_is_better': True}],
    }


def _generated(questions: QuestionSet, protocol: Protocol, chat: bool) -> dict[str, Any]:
    is_greedy = protocol.mode == 'greedy'
    # Spelled out, for a model's own generation settings may say otherwise.
    drawn = {'do_sample': True, 'temperature': 1.0, 'top_k': 0, 'top_p': 1.0, 'repetition_penalty': 1.0}
    how = {'do_sample': False, 'repetition_penalty': 1.0} if is_greedy else drawn
    # Without a chat's end of turn a model goes on and asks itself the next question.
    until = [] if chat else ['Question:', 'Passage:']
    return {
        'output_type': 'generate_until',
        'doc_to_target': questions.target,
        'repeats': protocol.answers,
        'generation_kwargs': {**how, 'max_gen_toks': questions.max_new_tokens, 'until': until},
        'filter_list': [{'name': 'samples', 'filter': [{'function': 'take_first_k', 'k': protocol.answers}]}],
        'process_results': partial(_judged, is_right=questions.is_right),
        'metric_list': [
            {'metric': 'acc', 'aggregation': 'mean', 'higher_is_better': True},
            {'metric': 'no_answer', 'aggregation': 'mean', 'higher_is_better': False},
        ],
    }


def _judged(row: Row, results: list[list[str]], is_right: Callable[[str, Row], Optional[bool]]) -> dict[str, float]:
    verdicts = [is_right(text, row) for text in results[0]]
    return {'acc': verdicts.count(True) / len(verdicts), 'no_answer': verdicts.count(None) / len(verdicts)}


def _prompt(row: Row, questions: QuestionSet, steps: bool, chat: bool) -> str:
    return questions.ask(row, steps) + ('' if chat else '\n\nResponse:')


def _chosen(rows: Any, questions: QuestionSet, protocol: Protocol) -> Any:
    return _parts(rows, questions, protocol)[0]


def _examples(rows: Any, questions: QuestionSet, protocol: Protocol) -> Any:
    return _parts(rows, questions, protocol)[1]


def _parts(rows: Any, questions: QuestionSet, protocol: Protocol) -> tuple[Any, Any]:
    """Returns the questions that are asked, in their order, and the examples that precede each of them."""
    _check_columns(rows, questions)
    if questions.subject is not None:
        rows = rows.select([i for i, subject in enumerate(rows['subject']) if subject == questions.subject])
    available = len(rows) - protocol.few_shot
    if available < 1:
        about = f" on '{questions.subject}'" if questions.subject else ''
        raise ValueError(
            f"'{questions.path}' has {len(rows)} questions{about}, too few for {protocol.few_shot} examples and one to "
            'ask.'
        )
    count = min(protocol.questions or questions.questions, available)
    # As the paper's code chooses, so that without examples the questions are the same.
    order = np.random.RandomState(protocol.seed).choice(len(rows), count + protocol.few_shot, replace=False)
    return rows.select(sorted(order[:count].tolist())), rows.select(order[count:].tolist())


def _check_columns(rows: Any, questions: QuestionSet) -> None:
    missing = next((column for column in questions.columns if column not in rows.column_names), None)
    if missing is not None:
        raise ValueError(f"The questions of '{questions.path}' have no column '{missing}', but {rows.column_names}.")
    for column, expected in questions.columns.items():
        for value in rows[column]:
            if type(value) is not expected:
                raise ValueError(
                    f"The column '{column}' of the questions of '{questions.path}' holds {value!r}, and should hold "
                    f'{_DESCRIBED[expected]}.'
                )
