# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""FLOPs and parameters: the published numbers, those of real models, and configurations of every kind."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from composer_bema.flops import (
    Architecture,
    active_parameter_count,
    architecture_of,
    context_length,
    forward_flops,
    parameter_count,
    read_config,
    training_flops,
)

GOLDEN = Path(__file__).parent / 'golden'
PUBLISHED = {
    config['id']: config['kwargs']
    for config in json.loads((GOLDEN / 'index.json').read_text())['peers']['epfml']['configs']
    if config['id'].startswith('flops/')
}

SIZES = {'hidden_size': 24, 'num_hidden_layers': 2, 'num_attention_heads': 4, 'vocab_size': 50}
LLAMA = {**SIZES, 'intermediate_size': 20, 'num_key_value_heads': 2, 'max_position_embeddings': 32}
QWEN_MOE = {**LLAMA, 'moe_intermediate_size': 12, 'num_experts': 4, 'num_experts_per_tok': 2}
CONFIGS = {
    'llama': LLAMA,
    'llama with wide heads': {**LLAMA, 'head_dim': 10},
    'llama with all heads': {**LLAMA, 'num_key_value_heads': None},
    'mistral': LLAMA,
    'qwen2': LLAMA,
    'qwen3': {**LLAMA, 'head_dim': 10},
    'gpt2': {'n_embd': 24, 'n_layer': 2, 'n_head': 4, 'vocab_size': 50, 'n_positions': 32},
    'gpt2 with n_inner': {'n_embd': 24, 'n_layer': 2, 'n_head': 4, 'vocab_size': 50, 'n_inner': 20},
    'gpt_neox': {**SIZES, 'intermediate_size': 20, 'rotary_pct': 1.0, 'max_position_embeddings': 32},
    'mixtral': {**LLAMA, 'num_local_experts': 4, 'num_experts_per_tok': 2},
    'qwen2_moe': {**QWEN_MOE, 'shared_expert_intermediate_size': 28},
    'qwen3_moe': {**QWEN_MOE, 'head_dim': 10},
    'mpt': {'d_model': 24, 'n_layers': 2, 'n_heads': 4, 'vocab_size': 50, 'max_seq_len': 32},
}
LENGTH = 16

sizes = st.integers(min_value=1, max_value=64)
architectures = st.builds(
    lambda heads, head_dim, **kwargs: Architecture(num_attention_heads=heads, head_dim=head_dim, **kwargs),
    heads=sizes,
    head_dim=sizes,
    hidden_size=sizes,
    intermediate_size=sizes,
    num_hidden_layers=sizes,
    vocab_size=sizes,
    gated_mlp=st.booleans(),
    tie_word_embeddings=st.booleans(),
    num_experts=st.just(4),
    num_experts_per_tok=st.integers(1, 4),
    shared_expert_intermediate_size=st.integers(0, 64),
)


def make_config(name: str, **kwargs):
    return AutoConfig.for_model(name.split()[0], **CONFIGS[name], **kwargs)


def make_model(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation='eager').eval()


def published(kwargs: dict) -> Architecture:
    return Architecture(
        hidden_size=kwargs['d_model'],
        intermediate_size=kwargs['ffw_size'],
        num_hidden_layers=kwargs['n_layers'],
        num_attention_heads=kwargs['num_heads'],
        num_key_value_heads=kwargs['num_kv_heads'],
        head_dim=kwargs['key_size'],
        vocab_size=kwargs['vocab_size'],
        gated_mlp=kwargs['swiglu'],
        num_experts=kwargs.get('n_experts', 0),
        num_experts_per_tok=kwargs.get('top_k', 0),
    )


@pytest.mark.parametrize('name', PUBLISHED)
def test_the_published_code_counts_the_same(name):
    kwargs = PUBLISHED[name]
    arrays = np.load(GOLDEN / 'epfml.npz', allow_pickle=False)
    flops = arrays[f'{name}/{"flops_moe" if "top_k" in kwargs else "get_flops"}']
    assert forward_flops(published(kwargs), kwargs['seq_len']) == flops
    assert parameter_count(published(kwargs)) == arrays[f'{name}/parameter_count']


def test_a_count_by_hand():
    model = Architecture(
        hidden_size=6,
        intermediate_size=5,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        vocab_size=7,
        gated_mlp=False,
    )
    # Heads are 8 wide together, keys and values 4 each.
    layer = 6 * 8 + 6 * 4 + 6 * 4 + 8 * 6 + 6 * 5 + 5 * 6
    assert parameter_count(model) == 7 * 6 + 3 * layer
    assert parameter_count(dataclasses.replace(model, tie_word_embeddings=False)) == 2 * 7 * 6 + 3 * layer
    # Ten tokens; keys and values count as wide as queries.
    attention = 4 * 2 * 10 * 6 * 8 + 2 * 2 * 10 * 10 * 8 + 3 * 2 * 10 * 10
    flops = 2 * 2 * 10 * 7 * 6 + 3 * (attention + 2 * 10 * (6 * 5 + 5 * 6))
    assert forward_flops(model, 10) == flops
    assert training_flops(model, 10) == 3 * flops
    assert training_flops(model, 10, tokens=25) == 3 * flops * 25 // 10


def test_experts_by_hand():
    dense = Architecture(8, 5, 2, 2, 7)
    experts = dataclasses.replace(dense, num_experts=6, num_experts_per_tok=2, shared_expert_intermediate_size=3)
    # Three matrices of 8 by 5 for each of the other experts, and of 8 by 3 for the shared one.
    assert parameter_count(experts) == parameter_count(dense) + 2 * 3 * 8 * (5 * 5 + 3)
    assert active_parameter_count(experts) == parameter_count(dense) + 2 * 3 * 8 * (5 + 3)
    assert active_parameter_count(dense) == parameter_count(dense)
    gate = 2 * 3 * 10 * 6
    assert forward_flops(experts, 10) == forward_flops(dense, 10) + 2 * 10 * 2 * 3 * 8 * (5 + 3) + gate


def test_a_model_that_everybody_knows():
    """Llama 2 7B has 6,738,415,616 parameters, among them those of 65 norms."""
    assert parameter_count(Architecture(4096, 11008, 32, 32, 32000, tie_word_embeddings=False)) == (
        6_738_415_616 - 65 * 4096
    )


def is_gate(name: str) -> bool:
    return name.endswith(('.gate.weight', '.shared_expert_gate.weight'))


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('name', CONFIGS)
def test_parameters_are_those_in_the_matrices_of_the_model(name, tied):
    """All but norms, biases, learned positions (wpe) and the gates of experts."""
    config = make_config(name, tie_word_embeddings=tied)
    matrices = {n: p.numel() for n, p in make_model(config).named_parameters() if p.ndim > 1}
    counted = {n: count for n, count in matrices.items() if 'wpe' not in n and not is_gate(n)}
    assert parameter_count(architecture_of(config)) == sum(counted.values())


@pytest.mark.parametrize('name', CONFIGS)
def test_flops_are_those_that_torch_counts_in_the_model(name):
    """But for what torch does not count, and what the published formula leaves out or takes for wider than it is."""
    config = make_config(name)
    model, a = make_model(config), architecture_of(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(LENGTH)[None])
    gates = sum(p.numel() for n, p in model.named_parameters() if is_gate(n))
    of_torch = {
        # Looking up a row is no matrix product.
        'embedding': -2 * LENGTH * a.vocab_size * a.hidden_size,
        'softmax': -3 * a.num_attention_heads * LENGTH**2 * a.num_hidden_layers,
        # With fewer heads of keys and values their matrices are narrower.
        'keys and values': -2 * 2 * LENGTH * a.hidden_size * (a.attention_width - a.key_value_width) * 2,
        # The gate is a matrix product, and not 3 FLOPs for each expert.
        'gate': 2 * LENGTH * gates - 3 * LENGTH * a.num_experts * a.num_hidden_layers,
        # The angles are products of positions and frequencies, once for all layers.
        'rotation': 0 if name.startswith(('gpt2', 'mpt')) else LENGTH * a.attention_width // a.num_attention_heads,
    }
    assert counter.get_total_flops() == forward_flops(a, LENGTH) + sum(of_torch.values())


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('name', CONFIGS)
def test_a_configuration_reads_alike_as_an_object_and_as_a_file(tmp_path, name, tied):
    config = make_config(name, tie_word_embeddings=tied)
    config.save_pretrained(tmp_path)
    architecture = architecture_of(config)
    assert architecture_of(read_config(tmp_path)) == architecture
    assert architecture_of(read_config(tmp_path / 'config.json')) == architecture
    assert architecture.tie_word_embeddings == tied
    assert context_length(read_config(tmp_path)) == (1024 if 'n_inner' in name else 32)


@pytest.mark.parametrize('name', CONFIGS)
def test_what_a_short_configuration_leaves_out_is_as_in_transformers(name):
    """Ties, the width of heads and of GPT-2's MLPs, and for a Llama the heads of keys and values."""
    short = dict(CONFIGS[name])
    if name == 'llama':
        del short['num_key_value_heads']
    model_type = name.split()[0]
    whole = architecture_of(AutoConfig.for_model(model_type, **short))
    read = architecture_of({'model_type': model_type, **short})
    assert parameter_count(read) == parameter_count(whole)
    assert forward_flops(read, LENGTH) == forward_flops(whole, LENGTH)


@given(architectures, st.integers(1, 50), st.integers(1, 10**12))
def test_counts_are_exact_and_of_equal_tokens(architecture, length, tokens):
    forward = forward_flops(architecture, length)
    assert forward % length == 0
    assert training_flops(architecture, length) == 3 * forward
    assert training_flops(architecture, length, tokens) * length == 3 * forward * tokens
    assert type(training_flops(architecture, length, tokens)) is int
    assert active_parameter_count(architecture) <= parameter_count(architecture)
    # Attention alone depends on the length.
    assert forward_flops(architecture, 2 * length) > 2 * forward


@given(architectures, st.sampled_from(['hidden_size', 'intermediate_size', 'num_hidden_layers', 'vocab_size']))
def test_what_is_larger_costs_more(architecture, name):
    larger = dataclasses.replace(architecture, **{name: getattr(architecture, name) + 1})
    assert parameter_count(larger) > parameter_count(architecture)
    assert forward_flops(larger, 3) > forward_flops(architecture, 3)


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        ({'hidden_size': 0}, 'hidden_size must be a positive whole number, not 0.'),
        ({'vocab_size': 2.0}, 'vocab_size must be a positive whole number, not 2.0.'),
        ({'num_hidden_layers': True}, 'num_hidden_layers must be a positive whole number, not True.'),
        ({'vocab_size': None}, 'vocab_size must be a positive whole number, not None.'),
        ({'head_dim': 0}, 'head_dim must be a positive whole number, not 0.'),
        ({'num_experts': -1}, 'num_experts must be a whole number that is not negative, not -1.'),
        ({'hidden_size': 9}, 'hidden_size=9 is no multiple of num_attention_heads=4: give head_dim.'),
        ({'num_key_value_heads': 3}, 'num_attention_heads=4 is no multiple of num_key_value_heads=3.'),
        ({'num_experts': 4}, 'num_experts_per_tok must lie between 1 and num_experts=4, or both be 0, not 0.'),
        ({'num_experts_per_tok': 2}, 'num_experts_per_tok must lie between 1 and num_experts=0, or both be 0, not 2.'),
    ],
)
def test_sizes_that_are_wrong(change, sentence):
    with pytest.raises(ValueError, match=f'^{sentence}$'):
        Architecture(**{**SIZES, 'intermediate_size': 20, **change})


@pytest.mark.parametrize('length', [0, -1, 2.0, None])
def test_a_length_that_is_wrong(length):
    with pytest.raises(ValueError, match='sequence_length must be a positive whole number of tokens, not'):
        forward_flops(Architecture(8, 5, 2, 2, 7), length)


@pytest.mark.parametrize(
    ('config', 'sentence'),
    [
        ({'model_type': 'bert', **LLAMA}, "The model_type 'bert' is none whose FLOPs can be told .*: give the numbers"),
        (LLAMA, 'A configuration without a model_type is none whose FLOPs can be told'),
        ({'model_type': 'llama', **SIZES}, r"\(model_type 'llama'\) does not say its intermediate_size"),
        ({'model_type': 'qwen3', **LLAMA}, "'qwen3'.* does not say its head_dim"),
        ({'model_type': 'mistral', **SIZES, 'intermediate_size': 20}, 'does not say its num_key_value_heads'),
        ({'model_type': 'gpt2', **LLAMA}, 'does not say its n_embd'),
        ({'model_type': 'mpt', **LLAMA}, 'does not say its d_model'),
        ({'model_type': 'llama', **LLAMA, 'vocab_size': None}, 'vocab_size must be a positive whole number, not None'),
        (
            {'model_type': 'mpt', **CONFIGS['mpt'], 'ffn_config': {'ffn_type': 'mb_moe'}},
            "with ffn_type mptmlp or mptglu: this one's is 'mb_moe', and its block_overrides are None.",
        ),
        (
            {'model_type': 'qwen2_moe', **CONFIGS['qwen2_moe'], 'decoder_sparse_step': 2},
            r'Some layers have experts and some have none \(decoder_sparse_step=2, mlp_only_layers=\[\]\)',
        ),
        (
            {'model_type': 'qwen3_moe', **CONFIGS['qwen3_moe'], 'mlp_only_layers': [0]},
            r'decoder_sparse_step=1, mlp_only_layers=\[0\]\): only models whose layers are all alike',
        ),
    ],
)
def test_configurations_that_cannot_be_counted(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        architecture_of(config)


@pytest.mark.parametrize(
    ('sections', 'expected'),
    [
        ({}, {'intermediate_size': 96, 'gated_mlp': False, 'num_key_value_heads': None}),
        ({'expansion_ratio': 2}, {'intermediate_size': 48}),
        ({'ffn_config': {'ffn_type': 'mptglu', 'ffn_hidden_size': 20}}, {'intermediate_size': 20, 'gated_mlp': True}),
        ({'attn_config': {'attn_type': 'multiquery_attention'}}, {'num_key_value_heads': 1}),
        ({'attn_config': {'attn_type': 'grouped_query_attention', 'kv_n_heads': 2}}, {'num_key_value_heads': 2}),
    ],
)
def test_the_sections_of_an_mpt(sections, expected):
    architecture = architecture_of({'model_type': 'mpt', **CONFIGS['mpt'], **sections})
    assert {name: getattr(architecture, name) for name in expected} == expected


def test_files_that_are_no_configurations(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no '.*/config.json', which is where"):
        read_config(tmp_path)
    (tmp_path / 'config.json').write_text('{"model_type":')
    with pytest.raises(ValueError, match="config.json' is not valid JSON"):
        read_config(tmp_path)
    (tmp_path / 'config.json').write_bytes(b'\xff\xfe{}')
    with pytest.raises(ValueError, match="config.json' is not valid JSON"):
        read_config(tmp_path)
    (tmp_path / 'config.json').write_text('[1]')
    with pytest.raises(ValueError, match="config.json' is no configuration, but list"):
        read_config(tmp_path)


def test_counting_needs_neither_torch_nor_transformers():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        'from composer_bema.flops import Architecture, forward_flops\n'
        'print(forward_flops(Architecture(8, 5, 2, 2, 7), 4))'
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert int(result.stdout) == forward_flops(Architecture(8, 5, 2, 2, 7), 4)
