# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The preference pairs that come with the package."""

import warnings

import pytest

from composer_bema.training.config import ConfigError
from composer_bema.training.data.toy_preferences import ANSWERS, QUESTIONS, build_toy_preferences, toy_pairs
from composer_bema.training.tokenizers import build_byte_tokenizer

TOKENIZER = build_byte_tokenizer()
FIRST = {
    'prompt': 'What is the use of dict()?',
    'chosen': ' It maps keys to values.',
    'rejected': ' It makes a number with a fraction.',
}


def is_right(pair):
    return any(
        pair['prompt'] == question.format(name) and pair['chosen'] == f' {answer}'
        for question in QUESTIONS
        for name, answer in ANSWERS.items()
    )


def test_pairs_are_the_same_everywhere():
    pairs = toy_pairs()
    assert pairs == toy_pairs()
    assert pairs[:10] == toy_pairs(10)
    assert pairs[0] == FIRST


def test_no_pair_comes_twice():
    pairs = [(pair['prompt'], frozenset((pair['chosen'], pair['rejected']))) for pair in toy_pairs(2160)]
    assert len(set(pairs)) == 2160
    assert all(len(answers) == 2 for _, answers in pairs)


def test_the_share_of_mistakes():
    assert sum(map(is_right, toy_pairs(2000))) == pytest.approx(1800, abs=40)
    assert all(map(is_right, toy_pairs(2000, flipped=0)))
    assert not any(map(is_right, toy_pairs(2000, flipped=1)))


def test_parts_share_no_pair_and_fit_into_96_bytes():
    with warnings.catch_warnings():
        # Of a cut pair.
        warnings.simplefilter('error')
        parts = [build_toy_preferences(TOKENIZER, 96, part=part).dataset for part in ('train', 'held_out')]
    texts = [{str(part[i]) for i in range(len(part))} for part in parts]
    assert list(map(len, texts)) == [1800, 200]
    assert not texts[0] & texts[1]


def test_a_sample():
    sample = build_toy_preferences(TOKENIZER, 96, num_pairs=1, part='all').dataset[0]
    assert TOKENIZER.decode(sample['chosen_input_ids']) == FIRST['prompt'] + FIRST['chosen'] + '</s>'
    target = sample['rejected_labels'][len(FIRST['prompt']) :]
    assert TOKENIZER.decode(target) == FIRST['rejected'] + '</s>'
    assert (sample['rejected_labels'][: len(FIRST['prompt'])] == -100).all()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'num_pairs': 0}, 'num_pairs must lie between 1 and 2160, not 0'),
        ({'num_pairs': 2161}, 'num_pairs must lie between 1 and 2160, not 2161'),
        ({'flipped': 1.5}, 'flipped must lie between 0 and 1, not 1.5'),
        ({'part': 'half'}, "part must be 'train', 'held_out' or 'all', not 'half'"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ConfigError, match=message):
        build_toy_preferences(TOKENIZER, 96, **arguments)
