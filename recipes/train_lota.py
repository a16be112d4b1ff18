"""Fine-tune a model as a lottery ticket (LoTA): calibrate, select, rewind, train sparsely, deliver.

    one GPU      python recipes/train_lota.py --config recipes/configs/llama31_8b_gsm8k.yaml
    one node     deepspeed recipes/train_lota.py --config recipes/configs/llama31_8b_gsm8k.yaml
    two nodes    deepspeed --hostfile hosts --num_nodes 2 recipes/train_lota.py --config FILE --shard_group_size node
    CPU ranks    OMP_NUM_THREADS=1 deepspeed --num_gpus 2 recipes/train_lota.py --config recipes/configs/demo.yaml ...

Every option of TRL's SFTConfig and of docs/options.md may be in the file or on the command line, which wins.
In output_dir: ticket/, summary.json, report.png, metrics.jsonl, config.yaml and, on request, merged/. Stages can run
separately: recipes/calibrate_mask.py stops at the mask, and `--mask PATH` starts from one. `--method full` trains all
weights and `--method lora` an adapter, with stock ZeRO-3 on the same data, for comparison. Installed, the same job is
`lota train` on one GPU, and `deepspeed --module lota train` or `torchrun -m lota train` on several.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file belongs to, if it has one

from lota.ranks.process import RESUME, run_job
from lota.train.job import main

if __name__ == "__main__":
    run_job(main, advice=RESUME)
