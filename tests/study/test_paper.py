"""Every command of the paper's plan parses, its folders differ, and what it names is made by a command before it."""

from __future__ import annotations

import shlex

from lota.packaged import CONFIGS
from lota.run.options import parse
from lota.study.paper import FOLDER, commands


def test_the_plan_of_the_paper() -> None:
    made: set[str] = set()
    for command in commands():
        assert shlex.split(str(command))[:4] == ["deepspeed", "--module", "lota", "train"]
        words = [word.replace(FOLDER, str(CONFIGS)) for word in command.words]  # where the copies come from
        args, config = parse(words)
        assert config.output_dir == command.out and command.out not in made
        for path in (args.model_name_or_path, *(args.retain or ())):
            folder = str(path).rsplit("/", 1)[0]
            assert not str(path).startswith("runs/") or folder in made
        assert args.pull is None or args.method == "lota"
        made.add(command.out)
    assert len(made) > 200
