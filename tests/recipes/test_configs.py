"""Every configuration runs as its comment says: known keys, rows as the hub has them, exactly the answers trained.

The hub's part is played by rows of the same form: names, splits and fields are those of the data sets' pages.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTTrainer

from lota.data import dataset, sources
from lota.data.options import DataArguments, plan_data
from lota.data.tokenizer import chat_template
from lota.run.options import LotaArguments, PolicyConfig, RecipeConfig, parse
from lota.run.resolve import RunOptions, resolve
from lota.train import rewards

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "recipes" / "configs"
MODELS = {
    "llama31_8b": "meta-llama/Llama-3.1-8B",
    "mistral_7b": "mistralai/Mistral-7B-v0.1",
    "qwen3_8b": "Qwen/Qwen3-8B-Base",
}


@dataclass
class Task:
    """What the hub has, and what is to come out of the first row: the text, and its trained part."""

    rows: dict[str, list[dict[str, Any]]]
    whole: str
    trained: str
    splits: tuple[str, ...] = ("train",)
    config: str | None = None
    more: list[tuple[str, str]] = field(default_factory=list)


CHAT = [
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye."},
    {"role": "assistant", "content": "See you."},
]
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
TASKS = {
    "gsm8k": Task(
        {"openai/gsm8k": [{"question": "2+2?", "answer": "It is <<2+2=4>>4.\n#### 4"}]},
        "<s>Question: 2+2?\nAnswer: It is <<2+2=4>>4.\n#### 4</s>",
        " It is <<2+2=4>>4.\n#### 4</s>",
        ("train", "test"),
        "main",
    ),
    "commonsense": Task(
        {
            "zwhe99/commonsense_170k": [
                {"instruction": "True or false?", "input": "", "output": "the correct answer is true", "answer": "true"}
            ]
        },
        f"<s>{ALPACA}\n\n### Instruction:\nTrue or false?\n\n### Response:\nthe correct answer is true</s>",
        "the correct answer is true</s>",
    ),
    "sql": Task(
        {
            "b-mc2/sql-create-context": [
                {
                    "answer": "SELECT a FROM t",
                    "question": "Which a?",
                    "context": "CREATE TABLE t (a VARCHAR)",
                }
            ]
        },
        "<s>CREATE TABLE t (a VARCHAR)\n\nQuestion: Which a?\nSQL: SELECT a FROM t</s>",
        " SELECT a FROM t</s>",
    ),
    "samsum": Task(
        {
            "knkarthick/samsum": [
                {"id": "1", "dialogue": None, "summary": "Nothing."},
                {"id": "2", "dialogue": "A: Hi\nB: Yo", "summary": "A greets B."},
            ]
        },
        "<s>Dialogue:\nA: Hi\nB: Yo\n\nSummary: A greets B.</s>",
        " A greets B.</s>",
        ("train", "validation", "test"),
    ),
    "ultrachat": Task(
        {"HuggingFaceH4/ultrachat_200k": [{"prompt": "Hi.", "prompt_id": "0", "messages": CHAT}]},
        "<s>Human: Hi.\n\nAssistant: Hello!</s>\n\nHuman: Bye.\n\nAssistant: See you.</s>",
        " Hello!</s> See you.</s>",
        ("train_sft", "test_sft", "train_gen", "test_gen"),
    ),
    "safety": Task(
        {
            "LLM-LAT/harmful-dataset": [{"prompt": "Do harm.", "rejected": "Sure", "chosen": "No."}],
            "LLM-LAT/benign-dataset": [{"prompt": "Do good.", "response": "Sure.", "refusal": "I can't"}],
        },
        "<s>Human: Do harm.\n\nAssistant: No.</s>",
        " No.</s>",
        more=[("<s>Human: Do good.\n\nAssistant: Sure.</s>", " Sure.</s>")],
    ),
}
FILES = [FOLDER / f"{model}_{task}.yaml" for model in MODELS for task in TASKS]


def commands(path: Path) -> list[list[str]]:
    """The command lines of the opening comment, as words."""
    head = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))
    assert head is not None
    text = re.sub(r"\\\n#", " ", head.group())
    return [shlex.split(line.removeprefix("#")) for line in text.splitlines() if line.startswith("# deepspeed")]


def options(path: Path, command: int = 0) -> tuple[LotaArguments, RecipeConfig, RunOptions]:
    words = commands(path)[command]
    argv = words[words.index("recipes/train_lota.py") + 1 :]
    args, config = parse(argv)
    return args, config, resolve(args, config, argv=argv)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and a few merges, <s> before every text: the shape of Llama 3's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([task.whole for task in TASKS.values()], trainer)
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str]]:
    """Stands in for the hub; which sets and splits were asked for. Its rows stay out of the user's cache."""
    asked = []
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def load_dataset(name: str, config: str | None, split: str) -> Dataset:
        (task,) = [task for task in TASKS.values() if name in task.rows]
        assert config == task.config and re.sub(r"\[-?\d*:-?\d*\]$", "", split) in task.splits
        asked.append((name, split))
        return Dataset.from_list(task.rows[name] * 3)

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    monkeypatch.chdir(ROOT)
    return asked


def test_every_model_has_every_task() -> None:
    found = {path for path in FOLDER.glob("*.yaml") if path.stem.startswith(tuple(MODELS))}
    assert found == set(FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_commands_of_the_comment_start_the_file_itself(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are parsed and checked as the recipe does it: every key is known, and none would be ignored."""
    monkeypatch.chdir(ROOT)
    one_node, two_nodes = commands(path)
    for words in (one_node, two_nodes):
        assert words[0] == "deepspeed" and words[words.index("--config") + 1] == f"recipes/configs/{path.name}"
        assert words[words.index("--output_dir") + 1] == f"runs/{path.stem}"
    assert two_nodes[1:5] == ["--hostfile", "hosts", "--num_nodes", "2"]
    (args, config, run), (on_two, *_) = options(path), options(path, 1)
    assert run.notes == () and run.shard_group_size is None and on_two.shard_group_size == "node"
    assert args.model_name_or_path == next(name for stem, name in MODELS.items() if path.stem.startswith(stem))
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps * 8 == 32


def test_the_models_files_differ_in_the_model_only() -> None:
    """So a change to one of them has to be made in its two neighbours as well."""
    for task in TASKS:
        texts = {
            (FOLDER / f"{stem}_{task}.yaml").read_text(encoding="utf-8").replace(stem, "STEM").replace(name, "NAME")
            for stem, name in MODELS.items()
        }
        assert len(texts) == 1, task


def test_the_tasks_files_share_all_that_is_not_the_data() -> None:
    own = {"per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "num_train_epochs"}
    chat = {"chat_template_path", "assistant_only_loss"}
    of_data = {entry.name for entry in DataArguments.__dataclass_fields__.values()}
    shared = []
    for task in TASKS:
        content = yaml.safe_load((FOLDER / f"llama31_8b_{task}.yaml").read_text(encoding="utf-8"))
        assert own <= set(content)
        shared.append({name: value for name, value in content.items() if name not in own | chat | of_data})
    assert all(content == shared[0] for content in shared)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_rows_of_the_hubs_form_train_the_answers_and_nothing_else(
    path: Path, hub: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    args, config, _ = options(path)
    task = TASKS[path.stem.removeprefix(next(stem for stem in MODELS if path.stem.startswith(stem)) + "_")]
    if args.eval_rows is not None:
        args.eval_rows = 1  # of the stand-in's few rows
    sets = dataset.load(plan_data(args), config.seed)
    assert {name for name, _ in hub} == set(task.rows)
    assert all(str(tmp_path) in file["filename"] for file in sets.train.cache_files)
    assert sets.evaluation is not None and len(sets.evaluation) > 0
    assert sets.evaluation.column_names == sets.train.column_names

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    changes = {"deepspeed": None, "output_dir": str(tmp_path / "out"), "bf16": False, "report_to": "none"}
    changes["chat_template_path"] = chat_template(config.chat_template_path)
    trainer = SFTTrainer(
        model=LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)),
        args=replace(config, **changes),
        train_dataset=sets.train,
        eval_dataset=sets.evaluation,
        processing_class=tokenizer,
    )
    seen = set()
    for row in trainer.train_dataset:
        trained = [number for number, label in zip(row["input_ids"], row["labels"]) if label != -100]
        assert trained == [label for label in row["labels"] if label != -100]
        seen.add((tokenizer.decode(row["input_ids"]), tokenizer.decode(trained)))
    assert seen == {(task.whole, task.trained), *task.more}


GRPO = {
    "grpo_qwen3_8b": "Question: 2+2?\nAnswer:",
    "grpo_llama31_8b": [
        {"role": "user", "content": "2+2?\nThink step by step, and end with the number alone."},
    ],
}


@pytest.mark.parametrize("name", GRPO)
def test_a_reward_gets_the_solutions_of_gsm8k(name: str, hub: list[tuple[str, str]]) -> None:
    """The commands of the comment are those of the file, and what is not the prompt goes to the reward."""
    (words,) = commands(FOLDER / f"{name}.yaml")
    argv = words[words.index("recipes/train_grpo.py") + 1 :]
    assert argv[1] == f"recipes/configs/{name}.yaml"
    args, config = parse(argv, PolicyConfig)
    run = resolve(args, config, argv=argv)
    assert run.notes == () and run.server is not None and run.calibration is not None
    sets = dataset.load(plan_data(args), config.seed, "prompts")
    assert sets.train[0]["prompt"] == GRPO[name] and sets.train.column_names == ["prompt", "fields"]
    (reward,) = rewards.load(run.rewards)
    is_chat = isinstance(GRPO[name], list)
    texts = ["It is 4.", "#### 4", "4, or 5", "", "1,004", "4.0"]
    answers = [[{"role": "assistant", "content": text}] if is_chat else text for text in texts]
    rows = [sets.train[0]] * len(texts)
    given = reward([row["prompt"] for row in rows], answers, fields=[row["fields"] for row in rows])
    assert given == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]


def test_the_small_reward_counts_animals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    argv = ["--config", "recipes/configs/grpo_small.yaml", "--model_name_or_path", "base", "--output_dir", "runs/grpo"]
    args, config = parse(argv, PolicyConfig)
    (reward,) = rewards.load(resolve(args, config, argv=argv).rewards)
    given = reward([""] * 4, ["cat dog cat", "a bird", "the", ""], fields=["{}"] * 4)
    assert given == [1, 0.5, 0, 0]
