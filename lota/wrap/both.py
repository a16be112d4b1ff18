"""The same command twice: calibration makes the mask, training the ticket."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lota.files import check_free
from lota.wrap.apart import check_apart, left_checkpoints, words_of
from lota.wrap.launch import launch, wait_for
from lota.wrap.order import CALIBRATION, TRAINING


def both(
    words: Sequence[str],
    out: Path,
    *,
    calibration: Mapping[str, Any],
    training: Mapping[str, Any],
    save: Mapping[str, Any],
    num_steps: int | None = None,
    calibration_words: Sequence[str] = (),
) -> int:
    """Make `out/mask` and `out/ticket`; the exit status.

    calibration, training: options of the blocks; save: of `save_ticket`. calibration_words: added to the command in
    calibration. num_steps: of training. ValueError where something is at these places, or where both phases would
    write into one folder.
    """
    mask, ticket = out / "mask", out / "ticket"
    check_free(ticket)
    in_calibration, then = [*words, *calibration_words], f"lota run train --mask {mask} --ticket {ticket} -- "
    if mask.exists():
        raise ValueError(f"{mask} exists already. To train on it: {then}{shlex.join(words)}. Or choose another folder")
    check_apart(words_of(in_calibration, CALIBRATION), words_of(words, TRAINING))
    status, seen = launch(in_calibration, CALIBRATION, mask, options=calibration)
    if status:
        return status
    if not wait_for(mask):
        raise ValueError(f"calibration ended, but {mask} is not there: give an --out that all hosts see")
    folder = next((report.output_dir for report in seen if report.output_dir), "")
    if left_checkpoints(folder):
        raise ValueError(
            f"calibration left checkpoints in {folder}, where training would write too and might resume from them. "
            f"The mask is kept. Move that folder away, then: {then}{shlex.join(words)}. Next time let the program take "
            "its folder's name from {phase} in the command or from LOTA_PHASE in its environment"
        )
    status, _ = launch(words, TRAINING, ticket, options={**training, "mask": str(mask.absolute())}, save=save,
                       num_steps=num_steps)  # fmt: skip
    return status
