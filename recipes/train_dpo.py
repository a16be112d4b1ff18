"""Preference training (DPO) on a lottery ticket: calibrate, select, rewind, train sparsely, deliver.

    one GPU      python recipes/train_dpo.py --config recipes/configs/dpo_llama31_8b.yaml
    one node     deepspeed recipes/train_dpo.py --config recipes/configs/dpo_llama31_8b.yaml
    two nodes    deepspeed --hostfile hosts --num_nodes 2 recipes/train_dpo.py --config FILE --shard_group_size node
    CPU ranks    OMP_NUM_THREADS=1 deepspeed --num_gpus 2 recipes/train_dpo.py --config recipes/configs/dpo_small.yaml

The flow, the options and the outputs are those of train_lota.py, with TRL's DPOConfig in place of SFTConfig and rows of
prompt, chosen and rejected. Calibration scores weights by the preference loss. The reference is the trained model with
the base's values put back for a forward pass: no second model (`reference: ticket`; `model` and `precompute` are the
other ways, docs/data.md). Installed, the same job is `lota dpo`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file belongs to, if it has one

from lota.ranks.process import RESUME, run_job
from lota.train.job import main_dpo as main

if __name__ == "__main__":
    run_job(main, advice=RESUME)
