# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Computes the loss of Hugging Face folders on MDS rows; the tests start it in llm-foundry's environment.

    python loss_of_folder.py MDS_FOLDER HF_FOLDER [HF_FOLDER ...]

Prints the mean cross entropy of each folder on a line of its own. It imports nothing of llm-foundry or composer_bema:
MPT's code comes with the folder, for a user of transformers, and is run as such.
"""

import sys

import numpy as np
import torch
from streaming import StreamingDataset
from transformers import AutoModelForCausalLM


def main() -> None:
    """Reads the rows, and computes the loss of each model on them."""
    data, *folders = sys.argv[1:]
    rows = StreamingDataset(local=data, batch_size=1)
    tokens = torch.stack([torch.from_numpy(np.frombuffer(row['tokens'], np.int64).copy()) for row in rows])
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            logits = model(tokens).logits[:, :-1].double()
        print(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item())


if __name__ == '__main__':
    main()
