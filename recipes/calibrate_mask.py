"""Calibrate on a base model and stop at the mask, for `train_lota.py --mask`, for `--protect`, or to look at.

    one GPU      deepspeed --num_gpus 1 recipes/calibrate_mask.py --config FILE --output_dir runs/mask
    one node     deepspeed recipes/calibrate_mask.py --config FILE --output_dir runs/mask
    two nodes    deepspeed --hostfile hosts --num_nodes 2 recipes/calibrate_mask.py --config FILE --output_dir runs/mask

Takes the files and options of train_lota.py. In output_dir: mask/, summary.json, metrics.jsonl and config.yaml.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # recipes run from the checkout, under any launcher

from lota.zero.world import join_world
from recipes import data, data_checks
from recipes.arguments import parse, validate
from recipes.batch import world_size
from recipes.job import RESUME, run_job, watch_ranks
from recipes.mask_phase import calibrate, mask_facts
from recipes.one_view import alike, check_output_dir, check_same
from recipes.preemption import listening
from recipes.run_folder import RunFolder, say, versions


@listening()
def main() -> None:
    started = time.monotonic()
    join_world()
    with alike():
        args, config = parse()
    watch_ranks()
    with alike():
        notes = validate(args, config, mask_only=True)
    check_output_dir(str(config.output_dir))
    with alike():
        sets = data.load(args, config.seed)
        notes += data_checks.check(sets, args, config)
    check_same("rows", data.identity(sets))
    folder = RunFolder(args, config)
    for note in notes:
        say(note)

    seconds: dict[str, float] = {}
    mask, facts, _ = calibrate(args, config, sets, folder, seconds)
    seconds["total"] = round(time.monotonic() - started, 2)
    summary: dict[str, Any] = {"model": args.model_name_or_path, "world_size": world_size(), "calibration": facts}
    summary |= {"mask": mask_facts(args, mask), "seconds": seconds, "versions": versions()}
    folder.draw_report(summary)
    folder.write_summary(summary)
    say(f"mask in {folder.path / 'mask'}, done in {seconds['total']:.0f} s")


if __name__ == "__main__":
    run_job(main, advice=RESUME)
