"""Teacher-forced exact match equals greedy decoding's, and the loss is that of the answer tokens alone."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lota.demo.small_model import END, PADDING, train_tokenizer
from lota.demo.world import World, WorldConfig
from lota.evaluate.answer_loss import score_answers


def test_exact_match_is_greedy_decodings() -> None:
    world = World(WorldConfig(num_sentences=300))
    tokenizer = train_tokenizer(world.plain_text(), 400)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()
    rows = []
    for number, prompt in enumerate(world.plain_text()[:12]):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        answer = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=PADDING, eos_token_id=None)
        completion = tokenizer.decode(answer[0, ids.shape[1] :])
        rows.append((ids[0].tolist(), answer[0, ids.shape[1] :].tolist(), completion, number % 2 == 0))

    class Fixed:
        """A tokenizer of texts that are numbers of rows, so that text round trips play no part."""

        pad_token_id, eos_token_id, eos_token = PADDING, END, "."

        def __call__(self, text: str) -> dict[str, list[int]]:
            number, *whole = text.rstrip(".").split("+")
            prompt, answer, _, is_right = rows[int(number)]
            if not whole:
                return {"input_ids": prompt}
            last = answer[-1] if is_right else (answer[-1] + 1) % 300
            return {"input_ids": [*prompt, *answer[:-1], last, *([self.eos_token_id] if text.endswith(".") else [])]}

    fixed = Fixed()
    # Greedy decoding was told to go on: the end token counts as wrong unless the model would choose it.
    with torch.no_grad():
        ends = [
            is_right and int(model(torch.tensor([[*prompt, *answer]])).logits[0, -1].argmax()) == END
            for prompt, answer, _, is_right in rows
        ]
    texts = [{"prompt": str(number), "completion": "+"} for number in range(len(rows))]
    assert score_answers(model, fixed, texts, batch_rows=5).exact == sum(ends) / len(rows)
    fixed.eos_token_id = int(model(torch.tensor([[*rows[0][0], *rows[0][1]]])).logits[0, -1].argmax())
    score = score_answers(model, fixed, texts[:2], batch_rows=5)
    assert score.exact == 0.5 and score.num_rows == 2  # the right one, and the one whose last token was made wrong

    total, count = 0.0, 0
    for number in range(2):
        ids = torch.tensor([[*fixed(f"{number}+")["input_ids"], fixed.eos_token_id]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        start = len(rows[number][0]) - 1
        total += float(-logits.log_softmax(-1)[range(start, ids.shape[1] - 1), ids[0, start + 1 :]].sum())
        count += ids.shape[1] - 1 - start
    torch.testing.assert_close(score.loss, total / count, rtol=1e-5, atol=0)  # fp32 logits
