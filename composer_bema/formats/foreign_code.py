# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Keeps transformers from running code that comes with a model, whichever way it was led there.

:func:`.refuse_named_code` refuses what is known to lead there. This holds where that knows too little:
``from_pretrained`` runs a ``custom_generate/generate.py`` in a local folder even without ``trust_remote_code``, and
models and tokenizers that are made within others ask on the terminal.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

__all__ = ['ForeignCodeError', 'no_foreign_code']

# Every way to code in a folder or a repository passes these before anything of it is imported; they are patched, and
# not the functions that call them, since other modules hold those under names of their own.
_CODE = 'transformers.dynamic_module_utils'
_BEFORE_IMPORTING = ('check_imports', 'get_relative_import_files')
# With no time for an answer this is called where the user would be asked.
_TIME_TO_ANSWER, _WITHOUT_ANSWER = 'TIME_OUT_REMOTE_CODE', '_raise_timeout_error'
# Has a kernel of the hub loaded. It is there where the package kernels is.
_KERNELS, _GET_KERNEL = 'transformers.modeling_utils', 'get_kernel'

# What is patched is the whole process's, so that one thread after another does it.
_ONE_AT_A_TIME = threading.RLock()


class ForeignCodeError(ValueError):
    """Code that comes with a model would have been run."""


@contextlib.contextmanager
def no_foreign_code(source: str, *, is_trusted: bool = False) -> Iterator[None]:
    """Has it raise an error where transformers would run code that comes with a model, or ask whether it may.

    Args:
        source (str): What is loaded, for the message.
        is_trusted (bool): Whether its code may run; nothing is held up then. Default: ``False``.

    Raises:
        ForeignCodeError: If it would.
    """
    if is_trusted:
        yield
        return

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        what = f' ({args[0]})' if args and isinstance(args[0], str) else ''
        raise ForeignCodeError(f"'{source}' has code of its own loaded{what}: remove it from there.")

    with _ONE_AT_A_TIME, contextlib.ExitStack() as patched:
        code, kernels = importlib.import_module(_CODE), importlib.import_module(_KERNELS)
        for name in (*_BEFORE_IMPORTING, _WITHOUT_ANSWER):
            patched.enter_context(_patched(code, name, refuse))
        patched.enter_context(_patched(code, _TIME_TO_ANSWER, 0))
        if hasattr(kernels, _GET_KERNEL):
            patched.enter_context(_patched(kernels, _GET_KERNEL, refuse))
        yield


@contextlib.contextmanager
def _patched(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
