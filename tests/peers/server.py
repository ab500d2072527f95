"""Run under mergekit's python: each line of JSON on stdin is a merge, each line out its outcome.

A request is {"plan": YAML text, "out": folder, "options": {...}}; the answer {"error": null} or
the error's text. The imports take seconds, so one process carries out every merge of a test run.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TextIO


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the peer prints must not mix with the replies
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    import torch
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    torch.set_num_threads(1)

    def merge(plan: str, out: str, options: dict[str, Any]) -> None:
        chosen: dict[str, Any] = {"copy_tokenizer": False, "write_model_card": False, "quiet": True}
        config = MergeConfiguration.model_validate(yaml.safe_load(plan))
        run_merge(config, out, MergeOptions(**chosen, **options))

    _reply(replies, None)
    for line in sys.stdin:
        try:
            merge(**json.loads(line))
            _reply(replies, None)
        except Exception as error:
            _reply(replies, f"{type(error).__name__}: {error}")


def _reply(replies: TextIO, error: str | None) -> None:
    replies.write(json.dumps({"error": error}) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
