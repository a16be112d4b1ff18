"""Writes docs/options.md from the options themselves: python docs/make_options.py"""

from __future__ import annotations

import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout that this file belongs to

from lota.data.options import DataArguments, Source, SourceArguments  # noqa: E402
from lota.evaluate.arguments import EvaluateArguments  # noqa: E402
from lota.run.arguments import LotaArguments  # noqa: E402
from lota.sequence.arguments import SequenceArguments  # noqa: E402

PAGE = ROOT / "docs" / "options.md"
HEAD = """# Options

`python docs/make_options.py` writes this page from the options themselves; `lota train --help` prints the same texts.
The default is in parentheses at the end of a line. Options go into the YAML file of `--config` or onto the command
line, which wins. A misspelt option is refused with the nearest right one. An option that a run would ignore is refused
by name.

`lota train` and `lota calibrate` also take every option of TRL's
[SFTConfig](https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig), `lota dpo` every option of its
[DPOConfig](https://huggingface.co/docs/trl/dpo_trainer#trl.DPOConfig), and `lota grpo` those of its
[GRPOConfig](https://huggingface.co/docs/trl/grpo_trainer#trl.GRPOConfig), but for a few that [are refused](grpo.md):
`learning_rate`, `max_steps`, `per_device_train_batch_size`, `save_steps`, `resume_from_checkpoint`, `report_to`, ...
`output_dir` must be given.
"""
SECTIONS = (
    ("The run: `lota train`, `lota dpo`, `lota grpo`, `lota calibrate`", LotaArguments, SourceArguments),
    ("The base model", SourceArguments, DataArguments),
    ("One data set", Source, None),
    ("Mixtures and evaluation rows", DataArguments, Source),
    ("`lota sequence`, beside those of `lota train` for every task", SequenceArguments, None),
    ("`lota evaluate`, beside the base and the data", EvaluateArguments, SourceArguments),
)


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, arguments, inherited in SECTIONS:
        known = set() if inherited is None else {entry.name for entry in fields(inherited)}
        rows = [_row(entry) for entry in fields(arguments) if entry.name not in known]
        parts.append("\n".join([f"## {title}", "", "| option | meaning |", "|---|---|", *rows, ""]))
    return "\n".join(parts)


def _row(entry: Any) -> str:
    text = str(entry.metadata["help"])
    text = text if text.endswith("...") else text.removesuffix(".")
    has_default = entry.default not in (None, MISSING) and not text.endswith(")")
    text += f" ({str(entry.default).lower() if isinstance(entry.default, bool) else entry.default})" * has_default
    return f"| `{entry.name}` | {text.replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
