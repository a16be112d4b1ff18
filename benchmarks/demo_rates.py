"""The demo's learning rates: both methods over equally many, what each learns and what it forgets.

    python benchmarks/demo_rates.py --output runs/demo-rates

Two CPU ranks, bf16, the demo's data and steps. LoTA calibrates once; its rates share that mask. Scores are of 512 test
rows of each task, like the demo's. About a minute a rate on two cores.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks run from the checkout

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from lota.data.dataset import read_jsonl
from lota.demo.base import prepare
from lota.demo.run import say, train
from lota.demo.small_model import SmallModelConfig
from lota.demo.world import EARLIER_TEMPLATES, NEW_TEMPLATES, WorldConfig, fill
from lota.evaluate.answer_loss import score_answers

FULL_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)
LOTA_RATES = (1e-3, 2e-3, 4e-3, 8e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output.resolve()
    output.mkdir(parents=True)
    disable_progress_bar()
    torch.set_num_threads(1)
    folder = prepare(WorldConfig(), SmallModelConfig(), say)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    new = fill(NEW_TEMPLATES, read_jsonl(folder / "test.jsonl"))
    earlier = fill(EARLIER_TEMPLATES, read_jsonl(folder / "earlier_test.jsonl"))

    rows = []
    mask = None
    for method, rate in [*(("full", rate) for rate in FULL_RATES), *(("lota", rate) for rate in LOTA_RATES)]:
        run = output / f"{method}-{rate:g}"
        options = ["--method", method, "--learning_rate", f"{rate:g}"]
        train(folder, run, options + (["--mask", str(mask)] if method == "lota" and mask else []))
        mask = run / "ticket" if method == "lota" else None
        model = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.bfloat16)
        scores = score_answers(model, tokenizer, new), score_answers(model, tokenizer, earlier)
        cells = [f"{score.exact:.1%} | {score.loss:.3f}" for score in scores]
        rows.append(f"| {method} | {rate:g} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    print("\n| method | learning rate | new: exact | loss | earlier: exact | loss |\n|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
