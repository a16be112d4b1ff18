"""Calibrate on a base model and stop at the mask, for `train_lota.py --mask`, for `--protect`, or to look at.

    one GPU      deepspeed --num_gpus 1 recipes/calibrate_mask.py --config FILE --output_dir runs/mask
    one node     deepspeed recipes/calibrate_mask.py --config FILE --output_dir runs/mask
    two nodes    deepspeed --hostfile hosts --num_nodes 2 recipes/calibrate_mask.py --config FILE --output_dir runs/mask

Takes the files and options of train_lota.py. In output_dir: mask/, summary.json, metrics.jsonl and config.yaml.
Installed, the same job is `lota calibrate`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file belongs to, if it has one

from lota.ranks.process import RESUME, run_job
from lota.train.job import main_mask as main

if __name__ == "__main__":
    run_job(main, advice=RESUME)
