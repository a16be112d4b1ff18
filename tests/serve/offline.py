"""What test_server.py runs with vLLM's Python: a `vllm.LLM` that switches; prints token ids per state as JSON.

python offline.py BASE PROMPTS.json TICKETS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams

    from lota.serve import OfflineServer, Refused, status, switch

    base, prompts, states = sys.argv[1], *(json.loads(Path(path).read_text()) for path in sys.argv[2:4])
    options = {"max_model_len": 128, "max_num_seqs": 16, "enforce_eager": True, "dtype": "float32"}
    llm = LLM(base, **options, weight_transfer_config={"backend": "lota"})
    server, answers = OfflineServer(llm), []
    for tickets in states:
        try:
            switch(server, tickets)
        except Refused as error:
            answers.append(str(error))
            continue
        assert status(server).tickets == tuple(tickets)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        made = llm.generate(inputs, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True), use_tqdm=False)
        answers.append([list(one.outputs[0].token_ids) for one in made])
    print("ANSWERS " + json.dumps(answers))


if __name__ == "__main__":
    main()
