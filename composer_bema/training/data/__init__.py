# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Training data: each loader of the registry in a room of its own, over shared blocks, chat masks and batching."""
