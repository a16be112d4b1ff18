"""Score a base model and tickets on it: local rows of prompt and answer, and tasks of lm-eval, with one load.

    one process   python recipes/evaluate.py --model_name_or_path BASE --tickets runs/a/ticket runs/b/ticket \\
                    --eval_file test.jsonl --prompt_template "Question: {question}\\nAnswer:" \\
                    --completion_template " {answer}" --metrics loss number --output results.json
    a run's data  python recipes/evaluate.py --config recipes/configs/llama31_8b_gsm8k.yaml --tickets runs/gsm8k/ticket
    lm-eval       python recipes/evaluate.py --model_name_or_path BASE --tickets runs/a/ticket --tasks gsm8k,arc_easy
    several GPUs  torchrun --nproc-per-node 8 recipes/evaluate.py ...      (splits the rows; lm-eval takes one process)

The base is scored first (--no_base leaves it out), then each ticket alone (--together: all of them at once; they must
share no entry). Tickets are assigned to the loaded model and removed again, bit for bit. Results are written after
every part; the same command again continues where it stopped. docs/evaluation.md defines the metrics.
Installed, the same program is `lota evaluate`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file belongs to, if it has one

from lota.evaluate.run import main
from lota.ranks.process import run_job

if __name__ == "__main__":
    run_job(main)
