# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""FLOPs and parameters of decoder transformers, dense and with experts, by plain arithmetic.

The count is that of Hägele et al., *Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations* (arXiv
2405.18392; code: epfml/schedules-and-scaling), number for number, so that curves over FLOPs can be laid on theirs. A
multiplication and an addition are two FLOPs. Counted are

- the matrix products of attention and MLP, all heads with keys and values of their own: grouped keys and values
  (``num_key_value_heads``) lessen the parameters only;
- attention over the whole sequence, neither causal nor in windows, and 3 FLOPs for each entry of a softmax;
- the embedding as a matrix product twice, of the tokens into it and of the last layer out of it, tied or not;
- with experts, those that a token goes to, shared ones, and 3 FLOPs for each token and expert as the gate.

Not counted are norms, biases, activation functions, rotations and positions, the loss and the optimizer, and of the
parameters those of norms, biases, learned positions and of the gates (routers) of experts.

Imports neither torch nor transformers: configurations come as what ``config.json`` holds, or as objects.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    'Architecture',
    'active_parameter_count',
    'architecture_of',
    'context_length',
    'forward_flops',
    'parameter_count',
    'read_config',
    'training_flops',
]

_CONFIG = 'config.json'


@dataclass(frozen=True)
class Architecture:
    """The sizes of a decoder transformer, under the names that they have in the Hugging Face configuration of a Llama.

    Args:
        hidden_size (int): The width of the residual stream.
        intermediate_size (int): The width of an MLP; with experts, that of one of them.
        num_hidden_layers (int): The number of blocks, which are all alike.
        num_attention_heads (int): The number of heads of queries.
        vocab_size (int): The rows of the embedding.
        num_key_value_heads (int, optional): The number of heads of keys and values. Default: ``num_attention_heads``.
        head_dim (int, optional): The width of a head. Default: ``hidden_size / num_attention_heads``.
        gated_mlp (bool): Whether an MLP has three matrices (SwiGLU) rather than two. Default: ``True``.
        tie_word_embeddings (bool): Whether the embedding is the output's matrix too, and so counts once among the
            parameters. Default: ``True``.
        num_experts (int): The MLPs that the gate of a layer chooses from; 0 has no gate and one MLP. Default: ``0``.
        num_experts_per_tok (int): Those that a token goes to; 0 without experts. Default: ``0``.
        shared_expert_intermediate_size (int): The width of the MLP that every token goes to besides. Default: ``0``.

    Raises:
        ValueError: If a size is no whole number, or not positive, or does not fit the others.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    num_key_value_heads: Optional[int] = None
    head_dim: Optional[int] = None
    gated_mlp: bool = True
    tie_word_embeddings: bool = True
    num_experts: int = 0
    num_experts_per_tok: int = 0
    shared_expert_intermediate_size: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.default == 0 else 1
            is_left_open = value is None and field.default is None
            if field.type != 'bool' and not is_left_open and (type(value) is not int or value < least):
                kind = 'positive whole number' if least else 'whole number that is not negative'
                raise ValueError(f'{field.name} must be a {kind}, not {value!r}.')
        if self.head_dim is None:
            self._check_multiple('hidden_size', 'num_attention_heads', ': give head_dim')
        if self.num_key_value_heads is not None:
            self._check_multiple('num_attention_heads', 'num_key_value_heads')
        if self.num_experts_per_tok > self.num_experts or (self.num_experts and not self.num_experts_per_tok):
            raise ValueError(
                f'num_experts_per_tok must lie between 1 and num_experts={self.num_experts}, or both be 0, not '
                f'{self.num_experts_per_tok}.'
            )

    def _check_multiple(self, name: str, divisor: str, advice: str = '') -> None:
        if getattr(self, name) % getattr(self, divisor):
            raise ValueError(
                f'{name}={getattr(self, name)} is no multiple of {divisor}={getattr(self, divisor)}{advice}.'
            )

    @property
    def attention_width(self) -> int:
        """The width of all heads' queries together."""
        return self.num_attention_heads * self._head_dim

    @property
    def key_value_width(self) -> int:
        """The width of all heads' keys, or values, together."""
        return (self.num_key_value_heads or self.num_attention_heads) * self._head_dim

    @property
    def _head_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def mlp_parameters(self, experts: int) -> int:
        """Returns the parameters of ``experts`` experts of a layer (0: of its one MLP) and of what is shared."""
        width = max(experts, 1) * self.intermediate_size + self.shared_expert_intermediate_size
        return (3 if self.gated_mlp else 2) * self.hidden_size * width


def forward_flops(architecture: Architecture, sequence_length: int) -> int:
    """Returns the FLOPs of a forward pass over ONE sequence, a multiple of its length.

    With s the length, d = ``hidden_size``, w the width of all heads, h heads, E experts and a vocabulary of V, they are

        4 s V d + layers * (8 s d w + 4 s^2 w + 3 h s^2 + 2 s * (parameters of the MLPs that a token goes to) + 3 s E)

    Args:
        architecture (Architecture): The sizes of the model.
        sequence_length (int): In tokens.

    Raises:
        ValueError: If the length is no positive whole number.
    """
    if type(sequence_length) is not int or sequence_length < 1:
        raise ValueError(f'sequence_length must be a positive whole number of tokens, not {sequence_length!r}.')
    a, s = architecture, sequence_length
    embeddings = 2 * 2 * s * a.vocab_size * a.hidden_size
    projections = 4 * 2 * s * a.hidden_size * a.attention_width
    # Queries times keys, and weights times values.
    products = 2 * 2 * s**2 * a.attention_width
    softmax = 3 * a.num_attention_heads * s**2
    mlps = 2 * s * a.mlp_parameters(a.num_experts_per_tok)
    gate = 3 * s * a.num_experts
    return embeddings + a.num_hidden_layers * (projections + products + softmax + mlps + gate)


def training_flops(architecture: Architecture, sequence_length: int, tokens: Optional[int] = None) -> int:
    """Returns the FLOPs of training, three times those of :func:`forward_flops`: a backward pass costs two forward.

    That is what training every weight takes; activations that are computed again, and weights that are frozen, are not
    looked at.

    Args:
        architecture (Architecture): The sizes of the model.
        sequence_length (int): In tokens.
        tokens (int, optional): The tokens trained on, in sequences of that length. Default: those of ONE sequence.
    """
    of_a_token = 3 * forward_flops(architecture, sequence_length) // sequence_length
    return of_a_token * (sequence_length if tokens is None else tokens)


def parameter_count(architecture: Architecture) -> int:
    """Returns the parameters in matrices; those of the embedding twice if it is not tied to the output."""
    a = architecture
    embeddings = (1 if a.tie_word_embeddings else 2) * a.vocab_size * a.hidden_size
    attention = 2 * a.hidden_size * (a.attention_width + a.key_value_width)
    return embeddings + a.num_hidden_layers * (attention + a.mlp_parameters(a.num_experts))


def active_parameter_count(architecture: Architecture) -> int:
    """Returns the parameters that one token meets: of the experts those that it goes to."""
    return parameter_count(dataclasses.replace(architecture, num_experts=architecture.num_experts_per_tok))


class _ModelType(NamedTuple):
    """How transformers configures one ``model_type``.

    Args:
        keys (dict): What it calls the sizes of an :class:`Architecture`.
        derived (tuple): Those that it may leave out or empty.
        gated_mlp (bool): Whether its MLPs have three matrices.
        tie_word_embeddings (bool): Whether its embeddings are tied where it does not say so.
    """

    keys: dict[str, str]
    derived: tuple[str, ...] = ('head_dim',)
    gated_mlp: bool = True
    tie_word_embeddings: bool = False


_BASE = {
    name: name
    for name in ('hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads', 'vocab_size')
}
_LLAMA = {**_BASE, 'num_key_value_heads': 'num_key_value_heads', 'head_dim': 'head_dim'}
_QWEN_MOE = {
    **_LLAMA,
    'intermediate_size': 'moe_intermediate_size',
    'num_experts': 'num_experts',
    'num_experts_per_tok': 'num_experts_per_tok',
}
_GPT2 = {
    'hidden_size': 'n_embd',
    'intermediate_size': 'n_inner',
    'num_hidden_layers': 'n_layer',
    'num_attention_heads': 'n_head',
    'vocab_size': 'vocab_size',
}
_MODEL_TYPES = {
    'llama': _ModelType(_LLAMA, derived=('head_dim', 'num_key_value_heads')),
    'mistral': _ModelType(_LLAMA),
    'qwen2': _ModelType(_LLAMA),
    'qwen3': _ModelType(_LLAMA, derived=()),
    'gpt2': _ModelType(_GPT2, derived=('n_inner',), gated_mlp=False, tie_word_embeddings=True),
    'gpt_neox': _ModelType(_BASE, gated_mlp=False),
    'mixtral': _ModelType({**_LLAMA, 'num_experts': 'num_local_experts', 'num_experts_per_tok': 'num_experts_per_tok'}),
    'qwen2_moe': _ModelType({**_QWEN_MOE, 'shared_expert_intermediate_size': 'shared_expert_intermediate_size'}),
    'qwen3_moe': _ModelType(_QWEN_MOE),
    # Its sizes of heads and MLPs are in sections of their own, see `_flat_mpt`.
    'mpt': _ModelType(
        {
            **_LLAMA,
            'hidden_size': 'd_model',
            'num_hidden_layers': 'n_layers',
            'num_attention_heads': 'n_heads',
        },
        derived=('head_dim', 'num_key_value_heads'),
        tie_word_embeddings=True,
    ),
}
_MPT_MLPS = {'mptmlp': False, 'mptglu': True}


def architecture_of(config: Union[Mapping[str, Any], PretrainedConfig]) -> Architecture:
    """Returns the architecture that a Hugging Face configuration describes.

    Args:
        config (Mapping | PretrainedConfig): What a ``config.json`` holds, or a configuration of transformers, whose
            ``model_type`` is ``llama``, ``mistral``, ``qwen2``, ``qwen3``, ``gpt2``, ``gpt_neox``, ``mixtral``,
            ``qwen2_moe``, ``qwen3_moe``, or ``mpt`` as transformers and llm-foundry have it.

    Raises:
        ValueError: If it is of another type, lacks a size, or has layers that differ (some with experts, some without).
    """
    values = config if isinstance(config, Mapping) else config.to_dict()
    name = values.get('model_type')
    if name not in _MODEL_TYPES:
        what = f"The model_type '{name}'" if name else 'A configuration without a model_type'
        raise ValueError(
            f'{what} is none whose FLOPs can be told ({", ".join(_MODEL_TYPES)}): give the numbers themselves '
            f'({", ".join(_BASE)}, ...).'
        )
    model_type = _MODEL_TYPES[name]
    if name == 'mpt':
        values, gated_mlp = _flat_mpt(values)
        model_type = model_type._replace(gated_mlp=gated_mlp)
    _check_layers_are_alike(values)
    for key in model_type.keys.values():
        if key not in values and key not in model_type.derived:
            raise ValueError(f"The configuration (model_type '{name}') does not say its {key}.")
    sizes: dict[str, Any] = {size: values.get(key) for size, key in model_type.keys.items()}
    if name == 'gpt2' and sizes['intermediate_size'] is None:
        sizes['intermediate_size'] = 4 * values['n_embd']
    is_tied = values.get('tie_word_embeddings', model_type.tie_word_embeddings)
    return Architecture(**sizes, gated_mlp=model_type.gated_mlp, tie_word_embeddings=is_tied)


def context_length(config: Mapping[str, Any]) -> Optional[int]:
    """Returns the longest sequence that a configuration provides for, in tokens; None if it does not say."""
    keys = ('max_position_embeddings', 'n_positions', 'max_seq_len')
    return next((config[key] for key in keys if key in config), None)


def read_config(path: Union[str, Path]) -> dict[str, Any]:
    """Reads a Hugging Face configuration, with nothing but JSON.

    Args:
        path (str | Path): A ``config.json``, or a folder with one.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is none.
    """
    path = Path(path)
    file = path / _CONFIG if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"There is no '{file}', which is where a Hugging Face model would be configured.")
    try:
        config = json.loads(file.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f"'{file}' is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"'{file}' is no configuration, but {type(config).__name__}: a JSON object was expected.")
    return config


def _flat_mpt(config: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Returns the configuration of an MPT with all sizes at the top, and whether its MLPs have three matrices.

    Raises:
        ValueError: If it has MLPs of another kind, such as experts, or layers that differ.
    """
    attention, mlp = config.get('attn_config') or {}, config.get('ffn_config') or {}
    kind = mlp.get('ffn_type', 'mptmlp')
    if kind not in _MPT_MLPS or config.get('block_overrides'):
        raise ValueError(
            f"An MPT is counted if its layers are all alike, with ffn_type {' or '.join(_MPT_MLPS)}: this one's is "
            f'{kind!r}, and its block_overrides are {config.get("block_overrides")!r}.'
        )
    heads_of_keys = {'multiquery_attention': 1, 'grouped_query_attention': attention.get('kv_n_heads')}
    width = int(config.get('expansion_ratio', 4) * config.get('d_model', 0))
    sizes = {
        'num_key_value_heads': heads_of_keys.get(attention.get('attn_type', '')),
        'intermediate_size': mlp.get('ffn_hidden_size') or width,
    }
    return {**config, **sizes}, _MPT_MLPS[kind]


def _check_layers_are_alike(config: Mapping[str, Any]) -> None:
    step, without = config.get('decoder_sparse_step') or 1, config.get('mlp_only_layers') or []
    if step != 1 or without:
        raise ValueError(
            f'Some layers have experts and some have none (decoder_sparse_step={step}, mlp_only_layers={without}): '
            'only models whose layers are all alike are counted.'
        )
