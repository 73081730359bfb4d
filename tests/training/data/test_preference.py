# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Preference pairs: the forms of a row, prompts, targets, cutting, dropping, batches and what is counted."""

import json
import logging
import warnings

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from composer_bema.training.config import ConfigError
from composer_bema.training.data.loaders import IGNORED_LABEL, build_data_spec, split_batch
from composer_bema.training.data.pairs import Completion, cut_pair, special_tokens, split_pair
from composer_bema.training.data.preference import build_preference, count_pairs
from composer_bema.training.tokenizers import build_byte_tokenizer

# Each message is `<role letter>content|`; the assistant is asked with `<a>`.
TEMPLATE = (
    '{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}|{% endfor %}{% if add_generation_prompt %}<a>{% endif %}'
)
LETTERS = 'abcdefghijklmnopqrstuvwxyz <>|.'
# How a test writes the end-of-text token of the byte tokenizer, and a token that is no target.
END, NO_TARGET = '$', '_'


@pytest.fixture(scope='module')
def tokenizer():
    return build_byte_tokenizer(chat_template=TEMPLATE)


@pytest.fixture
def make(tmp_path, tokenizer):
    """Builds the loader from rows in a file."""

    def make(rows, tokenizer=tokenizer, **arguments):
        path = tmp_path / 'pairs.jsonl'
        path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
        hf_kwargs = {'data_files': str(path), 'cache_dir': str(tmp_path / 'cache')}
        arguments = {'max_seq_len': 64, 'part': 'all', 'hf_name': 'json', 'hf_kwargs': hf_kwargs} | arguments
        return build_preference(tokenizer, **arguments)

    return make


def fast_tokenizer():
    """One token a character, except `ab`; it opens what it reads with `<`."""
    vocabulary = {letter: index for index, letter in enumerate([*LETTERS, 'ab'])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token='.'))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex('ab|.'), 'isolated')
    tokenizer.post_processor = processors.TemplateProcessing(single='< $A', special_tokens=[('<', vocabulary['<'])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token='<')


def text_of(tokens):
    names = {IGNORED_LABEL: NO_TARGET, 0: '0', 1: END}
    return ''.join(names.get(token) or chr(token - 3) for token in tokens.tolist())


def texts_of(sample):
    """Both sides as text, and their targets."""
    return [text_of(sample[f'{side}_{name}']) for side in ('chosen', 'rejected') for name in ('input_ids', 'labels')]


def user(text):
    return {'role': 'user', 'content': text}


def assistant(text):
    return {'role': 'assistant', 'content': text}


def test_texts_with_a_prompt(make):
    sample = make([{'prompt': 'q?', 'chosen': ' yes', 'rejected': ' n'}]).dataset[0]
    assert texts_of(sample) == ['q? yes$', '__ yes$', 'q? n$', '__ n$']
    assert sample['chosen_input_ids'].dtype == sample['chosen_labels'].dtype == torch.int64


def test_texts_that_begin_alike(make):
    sample = make([{'chosen': 'It is pale.', 'rejected': 'It is pink.'}]).dataset[0]
    assert texts_of(sample) == ['It is pale.$', '_____ pale.$', 'It is pink.$', '_____ pink.$']


@pytest.mark.parametrize(
    ('chosen', 'rejected', 'prompt'),
    [
        ('a b c', 'a b d', 'a b'),
        ('a b cd', 'a b ce', 'a b'),
        ('a b', 'a b c', 'a b'),
        ('a b', 'a bc', 'a'),
        ('a:\nb', 'a:\nc', 'a:\n'),
        ('a  b', 'a  c', 'a '),
        ('b', 'c', ''),
        ('', 'c', ''),
    ],
)
def test_the_implicit_prompt_splits_no_word(chosen, rejected, prompt):
    assert split_pair({'chosen': chosen, 'rejected': rejected}) == (
        prompt,
        chosen[len(prompt) :],
        rejected[len(prompt) :],
    )


@pytest.mark.parametrize(
    'row',
    [
        {'prompt': [user('q')], 'chosen': [assistant('y')], 'rejected': [assistant('n')]},
        {'prompt': [user('q')], 'chosen': [user('q'), assistant('y')], 'rejected': [user('q'), assistant('n')]},
        {'prompt': [user('q')], 'chosen': 'y', 'rejected': 'n'},
        {'chosen': [user('q'), assistant('y')], 'rejected': [user('q'), assistant('n')]},
        {'prompt': 'q', 'chosen': [user('q'), assistant('y')], 'rejected': [user('q'), assistant('n')]},
        {'prompt': 'q', 'chosen': [assistant('y')], 'rejected': [assistant('n')]},
        {'prompt': None, 'chosen': [user('q'), assistant('y')], 'rejected': [user('q'), assistant('n')]},
    ],
)
def test_forms_of_a_chat(make, row):
    assert texts_of(make([row]).dataset[0]) == ['<u>q|<a>y|', '________y|', '<u>q|<a>n|', '________n|']


def test_the_turns_before_the_reply_are_no_targets(make):
    turns = [user('a'), assistant('b'), user('c')]
    sample = make([{'chosen': [*turns, assistant('y')], 'rejected': [*turns, assistant('n')]}]).dataset[0]
    assert texts_of(sample)[:2] == ['<u>a|<a>b|<u>c|<a>y|', '__________________y|']


def test_special_tokens():
    fast = fast_tokenizer()
    less = fast.convert_tokens_to_ids('<')
    assert special_tokens(fast) == ([less], [])
    assert special_tokens(build_byte_tokenizer()) == ([], [1])


def test_a_fast_tokenizer_reads_prompt_and_completion_as_one_text(make):
    """`ab` is one token, which belongs to the completion that it ends in."""
    fast = fast_tokenizer()
    ids = fast.convert_tokens_to_ids
    sample = make([{'prompt': '|a', 'chosen': 'b|', 'rejected': 'c'}], tokenizer=fast).dataset[0]
    assert sample['chosen_input_ids'].tolist() == ids(['<', '|', 'ab', '|'])
    assert sample['chosen_labels'].tolist() == [IGNORED_LABEL, IGNORED_LABEL, *ids(['ab', '|'])]


def test_a_first_token_that_a_text_holds_already_is_not_repeated(make):
    fast = fast_tokenizer()
    sample = make([{'prompt': '<q', 'chosen': 'y', 'rejected': 'n'}], tokenizer=fast).dataset[0]
    assert sample['chosen_input_ids'].tolist() == fast.convert_tokens_to_ids(['<', 'q', 'y'])


def test_an_end_that_a_text_holds_already_is_not_repeated(make):
    sample = make([{'prompt': 'q', 'chosen': 'y</s>', 'rejected': 'n'}]).dataset[0]
    assert texts_of(sample)[::2] == ['qy$', 'qn$']


def test_two_processes_tokenize_alike(make):
    rows = [{'prompt': 'q', 'chosen': 'y', 'rejected': 'y'}, {'prompt': 'q', 'chosen': 'y', 'rejected': 'n'}]
    with pytest.warns(UserWarning, match='Kept 1 of 2 pairs'):
        dataset = make(rows, num_proc=2).dataset
    assert texts_of(dataset[0])[::2] == ['qy$', 'qn$']


def cut(chosen, rejected, max_seq_len, max_prompt_len):
    """Cut two sides written as `prompt/completion`, a token a letter."""
    sides = [Completion(list(map(ord, side.replace('/', ''))), side.index('/')) for side in (chosen, rejected)]
    texts = []
    for side in cut_pair(*sides, max_seq_len, max_prompt_len):
        text = ''.join(map(chr, side.tokens))
        texts.append(f'{text[: side.start]}/{text[side.start :]}')
    return tuple(texts)


@pytest.mark.parametrize(
    ('chosen', 'rejected', 'cut_chosen', 'cut_rejected'),
    [
        # It fits.
        ('abcdef/uv', 'abcdef/x', 'abcdef/uv', 'abcdef/x'),
        # The longer completion leaves room for 5 tokens of the prompt, more than the 3 it keeps at least.
        ('abcdefgh/uvw', 'abcdefgh/x', 'defgh/uvw', 'defgh/x'),
        # It leaves room for fewer than 3.
        ('abcdefgh/uvwxyz', 'abcdefgh/x', 'fgh/uvwxy', 'fgh/x'),
        # A short prompt stays, and the completions get the rest.
        ('a/uvwxyzuvw', 'a/x', 'a/uvwxyzu', 'a/x'),
        ('a/x', 'a/uvwxyzuvw', 'a/x', 'a/uvwxyzu'),
        ('abcd/uvwxyzuv', 'abcd/uvwxyz', 'bcd/uvwxy', 'bcd/uvwxy'),
        # A token across the boundary is part of one completion alone.
        ('abcdef/uvwxyz', 'abcdefg/x', 'def/uvwxy', 'efg/x'),
    ],
)
def test_cutting(chosen, rejected, cut_chosen, cut_rejected):
    assert cut(chosen, rejected, max_seq_len=8, max_prompt_len=3) == (cut_chosen, cut_rejected)


def test_what_is_cut_and_dropped_is_counted(make, caplog):
    rows = [
        {'prompt': 'q', 'chosen': 'y', 'rejected': 'n'},
        {'prompt': 'abcdefgh', 'chosen': 'y', 'rejected': 'n'},
        {'prompt': 'abcdefgh', 'chosen': 'y' * 9, 'rejected': 'n'},
        {'prompt': 'q', 'chosen': 'y', 'rejected': 'y'},
        # The end of a text is its only token, and the first one: nothing predicts it.
        {'prompt': '', 'chosen': '', 'rejected': 'n'},
    ]
    report = (
        r'Kept 3 of 5 pairs: 1 have an empty completion, 1 others two equal ones; of the kept, 2 have a cut prompt and '
        r'1 a cut completion \(max_seq_len=8, max_prompt_len=3\)\.'
    )
    with caplog.at_level(logging.INFO, 'composer_bema'), pytest.warns(UserWarning, match=report):
        dataset = make(rows, max_seq_len=8, max_prompt_len=3).dataset
    assert 'Kept 3 of 5 pairs' in caplog.text
    assert [texts_of(sample)[::2] for sample in (dataset[i] for i in range(len(dataset)))] == [
        ['qy$', 'qn$'],
        ['cdefghy$', 'cdefghn$'],
        ['fghyyyyy', 'fghn$'],
    ]


def test_nothing_is_said_when_every_pair_is_whole(make):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        make([{'prompt': 'q', 'chosen': 'y', 'rejected': 'n'}])


def test_half_of_the_row_is_the_prompts_by_default(make):
    with pytest.warns(UserWarning, match='max_prompt_len=4'):
        sample = make([{'prompt': 'abcdefgh', 'chosen': 'uvwxyz', 'rejected': 'x'}], max_seq_len=8).dataset[0]
    assert texts_of(sample)[:2] == ['efghuvwx', '____uvwx']


@pytest.mark.parametrize(
    'row',
    [
        {'prompt': 'q', 'chosen': 'y', 'rejected': 'y'},
        {'chosen': [user('q'), assistant('y')], 'rejected': [user('q'), assistant('y')]},
        {'chosen': [user('q'), assistant('y')], 'rejected': [user('q')]},
        {'chosen': '', 'rejected': 'y'},
        # Its end is a token, but nothing was said.
        {'prompt': 'q', 'chosen': ' \n', 'rejected': 'y'},
        {'chosen': [user('q'), assistant('')], 'rejected': [user('q'), assistant('y')]},
    ],
)
def test_nothing_left(make, row):
    with pytest.raises(ConfigError, match='none of the 1 pairs is left, all have an empty completion or two equal'):
        make([row])


def test_parts(make):
    rows = [{'prompt': str(i), 'chosen': 'y', 'rejected': 'n'} for i in range(20)]
    parts = [make(rows, part=part, train_fraction=0.9).dataset for part in ('train', 'held_out')]
    prompts = [{texts_of(part[i])[0] for i in range(len(part))} for part in parts]
    assert [len(part) for part in prompts] == [18, 2]
    assert prompts[0] | prompts[1] == {f'{i}y$' for i in range(20)}


@pytest.fixture
def batch(make):
    source = make([{'prompt': 'q' * i, 'chosen': 'yes', 'rejected': 'n'} for i in (1, 2, 3)])
    return source.collate([source.dataset[i] for i in range(3)])


def test_batches(batch):
    assert list(batch) == ['input_ids', 'attention_mask', 'labels']
    assert {(values.shape, values.dtype) for values in batch.values()} == {((3, 2, 7), torch.int64)}
    assert [text_of(side) for side in batch['input_ids'][0]] == ['qyes$00', 'qn$0000']
    assert [text_of(side) for side in batch['labels'][2]] == ['___yes$', '___n$__']
    assert batch['attention_mask'][1].tolist() == [[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0]]


def test_the_loss_is_a_mean_over_pairs(batch):
    assert count_pairs(batch) == {'total': 5 + 3 + 6 + 4 + 7 + 5, 'loss_generating': 3}


def test_microbatches_keep_pairs_together(batch):
    pieces = split_batch(batch, 2)
    assert [piece['labels'].shape for piece in pieces] == [(2, 2, 7), (1, 2, 7)]
    assert [text_of(side) for side in pieces[1]['input_ids'][0]] == ['qqqyes$', 'qqqn$00']
    assert [count_pairs(piece)['loss_generating'] for piece in pieces] == [2, 1]


def test_composer_counts_pairs(make):
    spec = build_data_spec(make([{'prompt': 'q', 'chosen': 'yes', 'rejected': 'n'}] * 3), batch_size=2)
    batch = next(iter(spec.dataloader))
    assert spec.get_num_samples_in_batch(batch) == 2
    assert spec.get_num_tokens_in_batch(batch, token_type='loss_generating') == 2
    assert spec.get_num_tokens_in_batch(batch, token_type='total') == 2 * (5 + 3)


@pytest.mark.parametrize(
    ('row', 'message'),
    [
        ({'chosen': 'y', 'rejected': 3}, 'chosen and rejected must be two texts or two lists of messages'),
        (
            {'chosen': None, 'rejected': 'n'},
            "two lists of messages .in the pair that begins .'chosen': None, 'rejected",
        ),
        ({'chosen': 'y', 'rejected': [assistant('n')]}, 'must be two texts or two lists of messages'),
        ({'prompt': 3, 'chosen': 'y', 'rejected': 'n'}, 'prompt must be a text or a list of messages, not 3'),
        ({'chosen': ['y'], 'rejected': ['n']}, 'message 0 must have a text as its role and one as its content'),
        ({'chosen': [], 'rejected': []}, r'a conversation must be a list of messages, not \[\]'),
        (
            {'chosen': [assistant('y')], 'rejected': [assistant('n')]},
            'chosen and rejected share no first message, and there is no prompt',
        ),
        (
            {'chosen': [user('q'), user('y')], 'rejected': [user('q'), assistant('n')]},
            "what follows the prompt must be the assistant's, not the user's",
        ),
    ],
)
def test_malformed_rows(make, row, message):
    with pytest.raises(ConfigError, match=message):
        make([row])


def test_both_columns_are_needed(make):
    with pytest.raises(ConfigError, match="'json' has no 'rejected' column, only prompt, chosen"):
        make([{'prompt': 'q', 'chosen': 'y'}])


def test_a_broken_line_is_named_with_its_file_and_number(tmp_path, tokenizer):
    path = tmp_path / 'rows.jsonl'
    path.write_text('{"chosen": "a", "rejected": "b"}\n{"chosen": \n')
    with pytest.raises(ConfigError, match=r"rows\.jsonl', line 2, is not JSON"):
        build_preference(tokenizer, 8, 'json', hf_kwargs={'data_files': str(path), 'cache_dir': str(tmp_path)})


@pytest.mark.parametrize('length', [0, 8])
def test_the_prompt_must_leave_room(make, length):
    message = f'max_prompt_len must lie between 1 and 7 tokens, less than max_seq_len=8, not {length}'
    with pytest.raises(ConfigError, match=message):
        make([{'chosen': 'y', 'rejected': 'n'}], max_seq_len=8, max_prompt_len=length)


def test_a_row_holds_two_tokens_at_least(make):
    with pytest.raises(ConfigError, match='max_seq_len must be at least 2 tokens'):
        make([{'chosen': 'y', 'rejected': 'n'}], max_seq_len=1)


def test_a_template_that_asks_differently_is_an_error(make):
    row = {'prompt': [user('q')], 'chosen': [assistant('y')], 'rejected': [assistant('n')]}
    tokenizer = build_byte_tokenizer(chat_template=TEMPLATE.replace('<a>', '<think>'))
    with pytest.raises(ConfigError, match='renders the prompt differently with and without the reply behind it'):
        make([row], tokenizer=tokenizer)


def test_chats_need_a_template(make):
    row = {'prompt': [user('q')], 'chosen': [assistant('y')], 'rejected': [assistant('n')]}
    with pytest.raises(ConfigError, match='chat_template'):
        make([row], tokenizer=build_byte_tokenizer())
