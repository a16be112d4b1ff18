"""Ask a served base with many tickets: the rows of each ticket together, so that the server switches once per ticket.

    VLLM_SERVER_DEV_MODE=1 vllm serve BASE --weight-transfer-config '{"backend": "lota"}'
    python recipes/ask_tickets.py http://127.0.0.1:8000 rows.jsonl answers.jsonl

rows.jsonl has {"prompt": ..., "ticket": "runs/math/ticket"} a line, with "ticket": null for the base itself. The
answers have the rows' order, and the server has its base at the end (docs/serving.md).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lota.serve import Server, as_server_knows, switch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("rows", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--max-tokens", type=int, default=256)
    args = parser.parse_args()
    server, groups = Server(args.url), dict[str | None, list[int]]()
    rows = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows):
        groups.setdefault(row["ticket"], []).append(number)
    model = server.get("v1/models")["data"][0]["id"]
    for ticket, numbers in groups.items():
        found = switch(server, [as_server_knows(ticket)] if ticket else [])
        print(f"{ticket or 'the base'}: {len(numbers)} rows, paused for {found.pause_seconds:.2f} s")
        prompts = [rows[number]["prompt"] for number in numbers]
        body = {"model": model, "prompt": prompts, "max_tokens": args.max_tokens, "temperature": 0}
        for choice in server.post("v1/completions", body)["choices"]:
            rows[numbers[choice["index"]]]["answer"] = choice["text"]
    switch(server, [])
    args.answers.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
