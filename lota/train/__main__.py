"""`deepspeed --module lota.train`, `torchrun -m lota.train`: the job of `lota train`."""

from lota.ranks.process import RESUME, run_job
from lota.train.job import main

if __name__ == "__main__":
    run_job(main, advice=RESUME)
