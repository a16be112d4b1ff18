"""Train tasks one after another into one model (LoTTO): each on entries of its own, all scored after each.

    one GPU      python recipes/train_sequence.py recipes/configs/sequence_llama31_8b.yaml --output_dir runs/five
    one node     deepspeed recipes/train_sequence.py recipes/configs/sequence_llama31_8b.yaml --output_dir runs/five
    two nodes    deepspeed --hostfile hosts --num_nodes 2 recipes/train_sequence.py FILE --shard_group_size node
    SLURM        sbatch recipes/slurm/multi_node.sbatch recipes/train_sequence.py FILE --output_dir runs/five
    CPU ranks    OMP_NUM_THREADS=1 deepspeed --num_gpus 2 recipes/train_sequence.py FILE --output_dir runs/five

The file lists the tasks; every other option is one of train_lota.py, for all tasks unless a task has its own. Each
task is a run folder 01-NAME, 02-NAME, ... in output_dir, beside matrix.csv, matrix.png, ledger.json, ledger.png and,
when all is done, summary.json. The same command again continues, with tasks that were added at the end. `FOLDER
--remove NAME` takes a task out, bit for bit. `--method full` and `--method lora` train the same tasks in sequence, for
comparison. docs/sequences.md explains it. Installed, the same job is `lota sequence`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file belongs to, if it has one

from lota.ranks.process import run_job
from lota.sequence.run import ADVICE, main

if __name__ == "__main__":
    run_job(main, advice=ADVICE)
