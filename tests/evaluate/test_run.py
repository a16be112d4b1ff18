"""Figures after switching tickets equal those of freshly loaded models exactly, and the base is the base again."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import tasks as lm_tasks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lota.data import dataset
from lota.data.options import DataArguments, plan_data
from lota.delivery.apply import apply_to_checkpoint
from lota.demo.small_model import save_atomically, train_tokenizer
from lota.demo.world import World, WorldConfig
from lota.evaluate import run as evaluate
from lota.evaluate.answer_loss import score_answers
from lota.evaluate.generate import Decoding, write_answers
from lota.evaluate.lm_eval_tasks import Harness
from lota.evaluate.options import parse
from lota.evaluate.rows import evaluation_rows, has_rows, reference
from lota.evaluate.scoring import Switch, score_rows
from lota.ticket import BaseTensor, Mask, Ticket, fingerprint, to_hex
from tests.rank_pool import RankPool

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOOSE = """
output_type: multiple_choice
doc_to_choice: [" one", " two"]
doc_to_target: "{{ 0 }}"
metric_list: [{metric: acc}]
"""
WRITE = """
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 6}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bf16 base, two disjoint tickets that change it much, one of another base, rows and tasks."""
    path = tmp_path_factory.mktemp("world")
    lines = World(WorldConfig(num_sentences=300)).plain_text()
    tokenizer = train_tokenizer(lines, 400)
    for name, seed in (("base", 0), ("other", 1)):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlamaConfig(
            vocab_size=len(tokenizer), **sizes, bos_token_id=1, eos_token_id=2, max_position_embeddings=128
        )
        save_atomically(LlamaForCausalLM(config).bfloat16(), tokenizer, path / name)
    for name, base, remainder in (("a", "base", 0), ("b", "base", 1), ("foreign", "other", 0)):
        make_ticket(path / base, remainder).save(path / name)
    # Some answers are what the base writes, with or without a number after it, so that no metric is 0 or 1 throughout.
    model = AutoModelForCausalLM.from_pretrained(path / "base")
    own = write_answers(model, tokenizer, [{"prompt": line} for line in lines[:7]], Decoding(max_new_tokens=6), 3)
    with open(path / "rows.jsonl", "w", encoding="utf-8") as file:
        for number, line in enumerate(lines[:7]):
            answer = own[number].strip() if number < 3 else f"{own[number].strip()[: 3 * number]} {number}"
            file.write(json.dumps({"question": line, "answer": answer}) + "\n")
    (path / "tasks").mkdir()
    for name, kind in (("choose", CHOOSE), ("write", WRITE)):
        head = TASK.format(name=f"local_{name}", data=path / "rows.jsonl")
        (path / "tasks" / f"{name}.yaml").write_text(head.strip() + kind, encoding="utf-8")
    return path


def make_ticket(base: Path, remainder: int) -> Ticket:
    """Every third entry of the blocks' matrices, from `remainder` on, gets a new value."""
    generator = torch.Generator().manual_seed(remainder)
    weights = {name: w for name, w in load_file(base / "model.safetensors").items() if "_proj" in name}
    mask = Mask.from_dense(
        {name: (torch.arange(w.numel()) % 3 == remainder).view(w.shape) for name, w in weights.items()},
        base={name: BaseTensor("bfloat16", to_hex(fingerprint(w.flatten()))) for name, w in weights.items()},
    )
    values = {name: (torch.randn(mask.active(name), generator=generator) / 4).bfloat16() for name in mask.names}
    return Ticket(mask, values, None, {})


def options(world: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--model_name_or_path", str(world / "base"), "--eval_file", str(world / "rows.jsonl")),
        *("--prompt_field", "question", "--completion_template", " {answer}", "--output", str(output)),
        *("--max_new_tokens", "6", "--batch_size", "3", *more),
    ]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


ALL = ("--metrics", "loss", "exact", "rouge")


def fresh_figures(model_path: Path, world: Path, output: Path) -> dict[str, Any]:
    """Of a checkpoint as it is: no ticket is applied to it in memory."""
    args = parse([*options(world, output, *ALL), "--model_name_or_path", str(model_path)])
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    how = evaluate.RowSettings(tuple(args.metrics), evaluate.decoding(args), args.batch_size)
    return score_rows(model, tokenizer, evaluation_rows(args, args.seed), how, "fresh")


def test_switching_gives_the_figures_of_fresh_models(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.json"
    tickets = [str(world / "a"), str(world / "b")]
    words = options(world, output, *ALL, "--tickets", *tickets, "--predictions", str(tmp_path / "written"))
    tasks = ("--tasks", "local_choose,local_write", "--tasks_path", str(world / "tasks"))
    evaluate.main([*words, *tasks])
    models = read(output)["models"]
    assert list(models) == ["base", *tickets]
    table = capsys.readouterr().out
    for name, ticket in zip(models, ([], ["a"], ["b"]), strict=True):
        path = world / "base"
        if ticket:
            path = tmp_path / f"merged_{ticket[0]}"
            apply_to_checkpoint(world / "base", [Ticket.load(world / ticket[0])], path)
        assert models[name]["rows"] == fresh_figures(path, world, tmp_path / "none.json"), name
        assert models[name]["tasks"]["local_choose"]["local_choose"]["num_rows"] == 7
        assert f"{models[name]['rows']['loss']:.4f}" in table
    base = models["base"]["rows"]
    assert 0 < base["exact"] < 1 and 0 < base["rougeL"] < 1
    assert all(entry["rows"]["rougeL"] < base["rougeL"] for name, entry in models.items() if name != "base")
    losses = [entry["rows"]["loss"] for entry in models.values()]
    assert len(set(losses)) == 3  # the tickets do change the answers
    assert models["base"]["rows"]["num_rows"] == 7 and models["base"]["seconds"].keys() == {
        *("rows", "local_choose", "local_write"),
    }
    lines = (tmp_path / "written" / "base.jsonl").read_text(encoding="utf-8").splitlines()
    written = [json.loads(line) for line in lines]
    assert [row["completion"] for row in written] == [row["completion"] for row in rows_of(world)]
    assert math.fsum(row["rougeL"] for row in written) / 7 == models["base"]["rows"]["rougeL"]

    # Once more: everything is there, so nothing is loaded; together: one entry is added, on the union of both tickets.
    before = output.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "load", None)
        evaluate.main([*words, *tasks])
    assert output.read_bytes() == before
    evaluate.main([*words, "--together", "--tasks_path", str(world / "tasks")])
    merged = tmp_path / "merged"
    apply_to_checkpoint(world / "base", [Ticket.load(path) for path in tickets], merged)
    both = read(output)["models"][" + ".join(tickets)]["rows"]
    assert both == fresh_figures(merged, world, tmp_path / "none.json") and both["loss"] not in losses
    with pytest.raises(ValueError, match=r"other settings \(decoding: .*Choose another output"):
        evaluate.main([*words, *tasks, "--temperature", "1"])


def rows_of(world: Path) -> list[dict[str, Any]]:
    return evaluation_rows(parse(options(world, world / "none.json")), 0)


def test_the_base_is_the_base_again_bit_for_bit_even_after_an_error(world: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(world / "base")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tickets = {name: Ticket.load(world / name) for name in ("a", "b", "foreign")}

    def is_base() -> bool:
        return all(torch.equal(t.view(torch.int16), before[n].view(torch.int16)) for n, t in bf16(model).items())

    def bf16(model: Any) -> dict[str, torch.Tensor]:
        return {name: t for name, t in model.state_dict().items() if t.dtype == torch.bfloat16}

    with pytest.raises(ValueError, match="fingerprint"), Switch(model) as switch:
        switch.to([tickets["a"]])
        assert not is_base()
        switch.to([tickets["b"]])
        switch.to([tickets["a"], tickets["b"]])
        switch.to([tickets["foreign"]])
    assert is_base()
    with pytest.raises(RuntimeError), Switch(model) as switch:
        switch.to([tickets["a"]])
        raise RuntimeError
    assert is_base()


def test_answers_do_not_depend_on_the_batch(world: Path) -> None:
    """Left padding, lengths and order: in fp32 every row is written as if it were alone."""
    model = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    rows = [*rows_of(world), {"prompt": "a", "completion": ""}]
    whole = write_answers(model, tokenizer, rows, Decoding(max_new_tokens=8), batch_rows=5)
    alone = [write_answers(model, tokenizer, [row], Decoding(max_new_tokens=8))[0] for row in rows]
    assert whole == alone and len(set(whole)) > 1
    ids = tokenizer(rows[0]["prompt"], return_tensors="pt")["input_ids"]
    plain = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=3)
    assert whole[0] == tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True)
    letter = whole[0].strip()[1]
    stopped = write_answers(model, tokenizer, rows, Decoding(max_new_tokens=8, stop=(letter,)), batch_rows=5)
    assert stopped == [text.split(letter)[0] for text in whole]
    # Sampling is asked for by a temperature; a seed repeats it.
    warm = [write_answers(model, tokenizer, rows, Decoding(8, temperature=2.0, seed=seed)) for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2] and warm[0] != whole


def test_a_models_own_sampling_settings_do_not_count(world: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    rows = rows_of(world)
    before = write_answers(model, tokenizer, rows, Decoding(max_new_tokens=8))
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=3.0, min_new_tokens=8)
    assert write_answers(model, tokenizer, rows, Decoding(max_new_tokens=8)) == before


def test_messages_are_put_into_the_chat_template(world: Path) -> None:
    """The answer's tokens are those that the template puts after the generation prompt, end mark included."""
    model = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    row = {"prompt": [{"role": "user", "content": "so"}], "completion": [{"role": "assistant", "content": "no"}]}
    prompt = tokenizer("[user] so</s>[assistant]", add_special_tokens=False)["input_ids"]
    whole = tokenizer("[user] so</s>[assistant] no</s>", add_special_tokens=False)["input_ids"]
    score = score_answers(model, tokenizer, [row])
    assert score.row_tokens == (len(whole) - len(prompt),)
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    nats = -sum(float(logits[place - 1, whole[place]]) for place in range(len(prompt), len(whole)))
    assert score.row_losses[0] == pytest.approx(nats, rel=1e-5)  # fp32 logits
    written = write_answers(model, tokenizer, [row], Decoding(max_new_tokens=5))
    plain = model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False, eos_token_id=2, pad_token_id=3)
    assert written == [tokenizer.decode(plain[0, len(prompt) :], skip_special_tokens=True)]


def on_ranks(world: Path, words: list[str]) -> None:
    evaluate.main(words)


def test_ranks_share_the_rows(world: Path, tmp_path: Path, ranks: Callable[[int], RankPool]) -> None:
    """Two ranks, seven rows, uneven: exactly the figures of one process, where batches are the same (of one row)."""
    words = ["--tickets", str(world / "a"), *ALL, "--dtype", "bfloat16", "--batch_size", "1"]
    evaluate.main(options(world, tmp_path / "one.json", *words))
    ranks(2).run(on_ranks, world, options(world, tmp_path / "two.json", *words))
    one, two = read(tmp_path / "one.json"), read(tmp_path / "two.json")
    assert {name: entry["rows"] for name, entry in one["models"].items()} == {
        name: entry["rows"] for name, entry in two["models"].items()
    }
    # What rank 0 finds in the results file goes for all: nothing is left to do, and other settings are refused alike.
    ranks(2).run(on_ranks, world, options(world, tmp_path / "two.json", *words))
    outcomes = ranks(2).outcomes(on_ranks, world, options(world, tmp_path / "two.json", *words, "--limit", "1"))
    assert all("other settings" in outcome.error for outcome in outcomes)
    outcomes = ranks(2).outcomes(on_ranks, world, options(world, tmp_path / "two.json", "--tasks", "gsm8k"))
    assert all("one process" in outcome.error for outcome in outcomes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metrics", "rogue"], "Did you mean 'rouge'"),
        (["--metric", "loss"], "unknown option 'metric'. Did you mean 'metrics'"),
        (["--prompt_field", "questoin"], "no field 'questoin'.*Did you mean 'question'"),
        (["--tickets", "nowhere"], "nowhere"),
        (["--tickets", "a", "a"], "every folder once"),
        (["--no_base"], "leaves nothing to score"),
        (["--together", "--tickets", "a"], "two tickets or more, got 1"),
        (["--limit", "0"], "limit must be at least 1"),
        (["--dtype", "int8"], "dtype must be auto, bfloat16"),
        (["--train_file", "x.jsonl"], "train_file would be ignored"),
        (["--predictions", "x"], "predictions would be empty"),
        (["--max_new_tokens", "0", "--metrics", "exact"], "max_new_tokens must be at least 1"),
        (["--max_new_tokens", "999", "--metrics", "exact"], "row 1 needs .* 128 positions.*lower max_new_tokens"),
        (["--density", "0.1"], "unknown option 'density'"),
        (["--chat_template_path", "x.jinja"], r"must be a \.jinja file that is there"),
        (["--output", "results"], r"output must name a \.json"),
    ],
)
def test_refusals(world: Path, tmp_path: Path, words: list[str], message: str) -> None:
    words = [str(world / word) if word == "a" else word for word in words]
    with pytest.raises(ValueError, match=message):
        evaluate.main(options(world, tmp_path / "results.json", *words))
    assert not list(tmp_path.iterdir())


def test_a_ticket_of_another_base_is_refused_before_anything_is_scored(world: Path, tmp_path: Path) -> None:
    tickets = [str(world / "a"), str(world / "foreign")]
    with pytest.raises(ValueError, match="fingerprint"):
        evaluate.main(options(world, tmp_path / "results.json", "--tickets", *tickets))
    assert not list(tmp_path.iterdir())


def test_what_is_no_task_and_what_is_nothing_to_score(world: Path, tmp_path: Path) -> None:
    words = ["--model_name_or_path", str(world / "base"), "--output", str(tmp_path / "results.json")]
    with pytest.raises(ValueError, match="nothing to score on"):
        evaluate.main(words)
    with pytest.raises(ValueError, match="metrics need rows"):
        evaluate.main([*words, "--metrics", "loss", "--tasks", "gsm8k"])
    tasks = ["--tasks", "local_chose", "--tasks_path", str(world / "tasks")]
    with pytest.MonkeyPatch.context() as patch:
        # Without lm-eval's own tasks: reading their files takes ten seconds and more.
        patch.setattr(lm_tasks, "TaskManager", partial(lm_tasks.TaskManager, include_defaults=False))
        with pytest.raises(ValueError, match=r"no task 'local_chose'\. Did you mean 'local_choose'\?"):
            evaluate.main([*words, *tasks])
    with pytest.raises(ValueError, match="tasks_path must be a folder"):
        evaluate.main([*words, *tasks[:2], "--tasks_path", "nowhere"])
    assert not list(tmp_path.iterdir())


def test_missing_extras_are_named_with_their_command(world: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "lm_eval.tasks", None)
        patch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
        with pytest.raises(ValueError, match=r"pip install 'lota\[eval\]'.*leave tasks out"):
            evaluate.main(options(world, tmp_path / "results.json", "--tasks", "gsm8k"))
        with pytest.raises(ValueError, match=r"rouge-score: pip install 'lota\[eval\]'"):
            evaluate.main(options(world, tmp_path / "results.json", "--metrics", "rouge"))
    assert not list(tmp_path.iterdir())


def test_a_training_config_gives_its_data(world: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name_or_path: {world / 'base'}\neval_file: {world / 'rows.jsonl'}\ntrain_file: elsewhere.jsonl\n"
        'prompt_field: question\ncompletion_template: " {answer}"\nlearning_rate: 1.0e-3\ndensity: 0.1\nbf16: true\n',
        encoding="utf-8",
    )
    evaluate.main(["--config", str(config), "--output", str(tmp_path / "results.json"), "--limit", "2"])
    assert read(tmp_path / "results.json")["models"]["base"]["rows"]["num_rows"] == 2
    config.write_text("learnin_rate: 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"unknown option 'learnin_rate'\. Did you mean 'learning_rate'"):
        evaluate.main(["--config", str(config)])


def test_what_was_scored_before_an_interruption_is_kept(world: Path, tmp_path: Path) -> None:
    """The first task's figures are in the file when the second one dies; the same command runs only what is missing."""
    words = options(world, tmp_path / "results.json", "--tasks", "local_choose,local_write")
    words += ["--tasks_path", str(world / "tasks"), "--no_base", "--tickets", str(world / "a")]
    run, done = Harness.run, []

    def dies(self: Harness, task: str, *args: Any) -> dict[str, Any]:
        done.append(task)
        if done == ["local_choose", "local_write"]:
            raise RuntimeError("out of memory")
        return run(self, task, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Harness, "run", dies)
        with pytest.raises(RuntimeError):
            evaluate.main(words)
        before = read(tmp_path / "results.json")["models"][str(world / "a")]
        evaluate.main([*words, "--batch_size", "2"])
    after = read(tmp_path / "results.json")["models"][str(world / "a")]
    assert done == ["local_choose", "local_write", "local_write"]
    assert before["rows"] == after["rows"] and before["tasks"] == {"local_choose": after["tasks"]["local_choose"]}


def test_a_retrained_ticket_is_scored_again(world: Path, tmp_path: Path) -> None:
    make_ticket(world / "base", 0).save(tmp_path / "t")
    words = options(world, tmp_path / "results.json", "--tickets", str(tmp_path / "t"))
    evaluate.main(words)
    first = read(tmp_path / "results.json")["models"]
    make_ticket(world / "base", 1).save(tmp_path / "t", overwrite=True)
    evaluate.main(words)
    second = read(tmp_path / "results.json")["models"]
    assert first["base"] == second["base"]
    assert first[str(tmp_path / "t")]["rows"] != second[str(tmp_path / "t")]["rows"]


def test_the_rows_are_those_that_a_training_run_is_evaluated_on(tmp_path: Path) -> None:
    def write(name: str, rows: list[dict[str, Any]]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(tmp_path / name)

    pairs = write("pairs.jsonl", [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(6)])
    talk = [{"role": role, "content": f"{role}{n}"} for n in range(2) for role in ("user", "assistant")]
    chat = write("chat.jsonl", [{"messages": talk}])
    text = write("text.jsonl", [{"text": "all of it"}])

    # Set aside by the run's seed: the very rows.
    args = DataArguments(train_file=[pairs], eval_rows=2)
    expected = dataset.load(plan_data(args), seed=7).evaluation
    assert expected is not None and evaluation_rows(args, 7) == expected.to_list() != evaluation_rows(args, 8)
    assert evaluation_rows(DataArguments(train_file=[pairs], eval_rows=2, eval_file=[text]), 7) == [
        {"prompt": "", "completion": "all of it"}
    ]
    # The last turn of a conversation is the answer.
    (row,) = evaluation_rows(DataArguments(eval_file=[chat]), 0)
    assert row == {"prompt": talk[:3], "completion": talk[3:]} and reference(row) == "assistant1"
    with pytest.raises(ValueError, match="ends with an assistant's answer to something, got roles user"):
        evaluation_rows(DataArguments(eval_file=[write("asked.jsonl", [{"messages": talk[:1]}])]), 0)
    # Of a mixture, the evaluation sets of all its entries; a plain text has no prompt.
    entries = [{"train_file": text, "eval_file": text, "weight": 1}, {"train_file": pairs, "weight": 2}]
    assert evaluation_rows(DataArguments(mixture=entries), 0) == [{"prompt": "", "completion": "all of it"}]
    assert not has_rows(DataArguments(mixture=entries[1:])) and not has_rows(DataArguments(train_file=[pairs]))
