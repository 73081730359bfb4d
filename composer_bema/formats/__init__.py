# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Checkpoint formats: what lies where in Composer's files and folders, in ours and in Hugging Face's."""
