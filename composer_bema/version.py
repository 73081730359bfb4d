# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The version of the package, its one home: `setup.py` reads it here without importing anything."""

__all__ = ['__version__']

__version__ = '0.1.0'
