# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Text and JSONL files to an MDS directory that the ``text`` loader, or llm-foundry's, streams."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Optional, Union

from streaming import MDSWriter
from transformers import PreTrainedTokenizerBase

from composer_bema.training.config import ConfigError
from composer_bema.training.data.blocks import token_blocks
from composer_bema.training.data.text_files import find_files, read_texts

__all__ = ['convert_to_mds']


def convert_to_mds(
    paths: Sequence[str],
    out: Union[str, Path],
    tokenizer: Optional[PreTrainedTokenizerBase] = None,
    concat_tokens: Optional[int] = None,
    text_field: str = 'text',
    compression: Optional[str] = None,
) -> int:
    """Write local files as an MDS dataset and return the number of its samples.

    With a tokenizer, samples are blocks of ``concat_tokens`` tokens (column ``tokens``, int64 bytes): documents end
    with the end-of-text token, and an incomplete last block is dropped. Without, samples are documents (column
    ``text``).

    Args:
        paths: Files or glob patterns, see :func:`.find_files`.
        out: The directory to make; it must not exist, and appears only when it is complete.
        tokenizer: Makes the tokens.
        concat_tokens: Tokens in a sample; goes with ``tokenizer``.
        text_field: The name of the text in JSONL rows.
        compression: streaming's name of an algorithm (``zstd``), or None.
    """
    if (tokenizer is None) != (concat_tokens is None):
        raise ConfigError('A tokenizer and the number of tokens in a sample (concat_tokens) go together.')
    out = Path(out)
    if out.exists():
        raise ConfigError(f"'{out}' exists already; remove it or write elsewhere.")
    texts = read_texts(find_files(paths), text_field)
    if tokenizer is None or concat_tokens is None:
        columns, samples = {'text': 'str'}, ({'text': text} for text in texts)
    else:
        blocks = token_blocks(texts, tokenizer, concat_tokens)
        columns, samples = {'tokens': 'bytes'}, ({'tokens': block.tobytes()} for block in blocks)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f'.{out.name}-', dir=out.parent))
    try:
        count = 0
        with MDSWriter(out=str(unfinished), columns=columns, compression=compression) as writer:
            for sample in samples:
                writer.write(sample)
                count += 1
        if not count:
            raise ConfigError(f'The files hold not one sample{f" of {concat_tokens} tokens" if concat_tokens else ""}.')
        # mkdtemp makes folders that only their owner can read, which a dataset is not.
        unfinished.chmod(0o755)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return count
