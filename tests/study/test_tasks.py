"""The study's tasks: languages that conflict as asked, streams of their own, judges that read answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lota.study import safety
from lota.study.texts import Texts
from lota.study.world import KNOWN, NEW, World, WorldConfig


@pytest.mark.parametrize("conflict", [0.0, 0.3, 1.0])
def test_two_languages_differ_in_the_share_of_words_that_is_asked_for(conflict: float) -> None:
    world = World(WorldConfig(conflict=conflict))
    spread = 3 * (conflict * (1 - conflict) / len(world.words)) ** 0.5
    assert abs(world.conflict(NEW[0], NEW[1]) - conflict) <= spread
    assert world.conflict(KNOWN[0], NEW[0]) == 1.0


def test_equal_configurations_give_equal_rows_and_streams_differ() -> None:
    one, other = World(WorldConfig()), World(WorldConfig())
    for task in (NEW[1], "reverse", "answer"):
        assert one.rows(task, "train", 50) == other.rows(task, "train", 50)
        assert one.rows(task, "train", 50) != one.rows(task, "test", 50)
    assert list(one.pretraining(40)) == list(other.pretraining(40))


def test_the_policy_refuses_what_is_harmful_and_the_judges_see_it() -> None:
    policy = safety.rows("policy", 0, "train", 200)
    refused = {row["prompt"] for row in policy if safety.REFUSAL in row["completion"]}
    assert 60 < sum(row["prompt"] in refused for row in policy) < 140
    for row in [*policy, *safety.rows("harmful", 0, "train", 50)]:
        is_refusal = safety.REFUSAL in row["completion"]
        assert safety.refuses(row["completion"]) == is_refusal
        assert safety.complies(row["completion"]) != is_refusal
    assert not safety.refuses("First take the rope, then open a door.") and not safety.complies("First of all, no.")


def test_real_text_is_cut_into_rows_to_learn_and_rows_to_pretrain_on(tmp_path: Path) -> None:
    for name in ("gsm8k_train", "gsm8k_test"):
        rows = [{"question": f"{name} {number}", "answer": str(number)} for number in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = Texts(tmp_path)
    learned = {row["prompt"] for row in texts.rows("math", "train")}
    assert len(learned) == 20 and all(prompt.endswith("\nAnswer:") for prompt in learned)
    pretrained = texts.pretraining()
    assert len(pretrained) == 20
    assert not any(text.split("\n")[0] in prompt for text in pretrained for prompt in learned)


def test_a_folder_without_known_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds none of gsm8k_train"):
        Texts(tmp_path)
    (tmp_path / "own.yaml").write_text("mine: {train: a.jsonl}\n")
    with pytest.raises(ValueError, match="expected tasks, each with train, test, prompt and completion"):
        Texts(tmp_path / "own.yaml")
