"""Training on a reward (GRPO) on a lottery ticket: calibrate, select, rewind, train sparsely, deliver.

    one GPU      python recipes/train_grpo.py --config recipes/configs/grpo_qwen3_8b.yaml
    one node     deepspeed recipes/train_grpo.py --config recipes/configs/grpo_qwen3_8b.yaml
    two nodes    deepspeed --hostfile hosts --num_nodes 2 recipes/train_grpo.py --config FILE --shard_group_size node
    a server     ... --server http://HOST:8000, a vLLM server that answers and gets the ticket after every step
    CPU ranks    OMP_NUM_THREADS=1 deepspeed --num_gpus 2 recipes/train_grpo.py --config recipes/configs/grpo_small.yaml

The flow, the options and the outputs are those of train_lota.py, with TRL's GRPOConfig in place of SFTConfig, rows of
prompt, and reward: FILE.py:function, which judges the model's answers and gets all other fields of the rows.
Calibration scores weights by the gradient of the GRPO loss itself. With a beta the reference is the model with the
base's values put back. docs/grpo.md has the details. Installed, the same job is `lota grpo`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file belongs to, if it has one

from lota.ranks.process import RESUME, run_job
from lota.train.job import main_grpo as main

if __name__ == "__main__":
    run_job(main, advice=RESUME)
