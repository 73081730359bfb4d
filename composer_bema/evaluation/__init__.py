# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Averaged weights on tasks: token loss, and questions that are asked through the lm-evaluation-harness."""
