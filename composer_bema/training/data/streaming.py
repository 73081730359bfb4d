# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Mosaic streaming (MDS) datasets of texts or of ready-made token blocks: llm-foundry's ``text`` loader."""

from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from streaming import StreamingDataset
from transformers import PreTrainedTokenizerBase

from composer_bema.formats.harmless import leads_below
from composer_bema.training.config import ConfigError
from composer_bema.training.data.loaders import DataSource, pad_batch

__all__ = ['StreamingText', 'build_streaming_text']


class StreamingText(StreamingDataset):
    """An MDS dataset whose samples hold ``tokens``, or a ``text`` that is tokenized when it is read.

    Args:
        tokenizer: Makes the tokens of samples that hold text.
        max_seq_len: Longer samples are cut here.
        token_encoding_type: The NumPy type of tokens that were written as plain bytes.
        **kwargs: streaming's own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_seq_len: int,
        token_encoding_type: str = 'int64',
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._require_files_in_folder()
        self.tokenizer = tokenizer
        self.max_seq_len = max_seq_len
        self.token_encoding_type = np.dtype(token_encoding_type)

    def _require_files_in_folder(self) -> None:
        # streaming downloads a shard to wherever its index says.
        for shard in self.shards:
            for info in (info for pair in shard.file_pairs for info in pair if info is not None):
                if not leads_below(info.basename):
                    raise ConfigError(
                        f"the index of the MDS dataset names the file '{info.basename}', which is not in its folder."
                    )

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        sample = super().__getitem__(at)
        tokens = torch.from_numpy(self._tokens(sample)[: self.max_seq_len].astype(np.int64))
        return {'input_ids': tokens, 'labels': tokens}

    def _tokens(self, sample: dict[str, Any]) -> np.ndarray:
        if 'tokens' in sample:
            tokens = sample['tokens']
            return np.frombuffer(tokens, self.token_encoding_type) if isinstance(tokens, bytes) else np.asarray(tokens)
        if 'text' in sample:
            return np.array(self.tokenizer(sample['text'], truncation=True, max_length=self.max_seq_len)['input_ids'])
        raise ConfigError(f'A sample of the MDS dataset holds {", ".join(sample)}, but neither tokens nor text.')


def build_streaming_text(
    tokenizer: PreTrainedTokenizerBase,
    device_batch_size: int,
    max_seq_len: int,
    local: Optional[str] = None,
    remote: Optional[str] = None,
    split: Optional[str] = None,
    shuffle: bool = False,
    shuffle_seed: int = 9176,
    predownload: Optional[int] = None,
    cache_limit: Optional[Union[int, str]] = None,
    num_canonical_nodes: Optional[int] = None,
    token_encoding_type: str = 'int64',
) -> DataSource:
    """Stream an MDS dataset, as ``composer-bema convert`` or llm-foundry's converters write it.

    Args:
        tokenizer: Makes the tokens of samples that hold text.
        device_batch_size: Samples in a batch of one device: the unit in which streaming deals samples out.
        max_seq_len: Longer samples are cut here, in tokens.
        local: Folder with the dataset, or where copies of ``remote``'s shards are kept.
        remote: Where shards are downloaded from; None: everything is in ``local``.
        split: Subfolder of both.
        shuffle: Visit the samples in a new order each epoch.
        shuffle_seed: Seed of that order.
        predownload: Samples to download ahead of their use.
        cache_limit: Bytes that ``local`` may take (``100gb``) before shards are evicted.
        num_canonical_nodes: Fix this to keep the order of samples when the number of nodes changes.
        token_encoding_type: The NumPy type of tokens that were written as plain bytes.
    """
    if local is None and remote is None:
        raise ConfigError('the dataset needs local, remote or both.')
    if remote is None and not (Path(str(local)) / (split or '') / 'index.json').is_file():
        raise ConfigError(f"there is no MDS dataset (index.json) in '{Path(str(local)) / (split or '')}'.")
    dataset = StreamingText(
        tokenizer,
        max_seq_len,
        token_encoding_type,
        local=local,
        remote=remote,
        split=split,
        shuffle=shuffle,
        shuffle_seed=shuffle_seed,
        predownload=predownload,
        cache_limit=cache_limit,
        num_canonical_nodes=num_canonical_nodes,
        batch_size=device_batch_size,
    )
    return DataSource(dataset, pad_batch(tokenizer), shuffle=False, shuffle_seed=shuffle_seed)
