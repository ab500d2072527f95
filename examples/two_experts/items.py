"""The tasks' items as rows that `mergekit-ft tune` and `mergekit-ft eval` read."""

import json
from pathlib import Path

DATA = Path(__file__).parent / "data"
TASKS = ("orders", "triage")
NEUTRAL = "neutral"
TURN = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"  # ChatML, no system turn


def rows_of(task: str, split: str) -> str:
    """Give one split of a task: the prompt as a turn, and the answer."""
    lines = (DATA / f"{task}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    rows = [{"prompt": TURN.format(prompt=i["prompt"]), "completion": i["answer"]} for i in items]
    return "".join(json.dumps(row) + "\n" for row in rows)


def neutral_rows() -> str:
    """Give the neutral paragraphs."""
    lines = (DATA / "neutral.txt").read_text(encoding="utf-8").splitlines()
    return "".join(json.dumps({"text": line}) + "\n" for line in lines)
