"""Chat templates: the well-known formats by name, the one that most models have, a Jinja text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mergekit_ft.tokens.vocabulary import SETTINGS, Files, settings, text_of

JINJA, LEGACY = "chat_template.jinja", "chat_template.json"

ALPACA = """\
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ message['content'] | trim }}{{ '\\n\\n' }}
{%- elif message['role'] == 'user' -%}
{{ '### Instruction:\\n' + message['content'] | trim + '\\n\\n' }}
{%- elif message['role'] == 'assistant' -%}
{{ '### Response:\\n' + message['content'] | trim + eos_token | default('', true) + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}
"""
CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
EXAONE = """\
{%- if messages and messages[0]['role'] != 'system' -%}
{{ '[|system|][|endofturn|]\\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{ '[|user|]' + message['content'] | trim + '\\n' }}
{%- else -%}
{{ '[|' + message['role'] + '|]' + message['content'] | trim + '[|endofturn|]\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '[|assistant|]' }}{%- endif -%}
"""
LLAMA3 = """\
{{- bos_token | default('<|begin_of_text|>', true) -}}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}
"""
MISTRAL = """\
{{- bos_token | default('<s>', true) -}}
{%- set lead = namespace(text='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{%- set lead.text = message['content'] | trim + '\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{{ '[INST] ' + lead.text + message['content'] | trim + ' [/INST]' }}{%- set lead.text = '' -%}
{%- elif message['role'] == 'assistant' -%}
{{ ' ' + message['content'] | trim + eos_token | default('</s>', true) }}
{%- endif -%}
{%- endfor -%}
"""
NAMED = {
    "alpaca": ALPACA,
    "chatml": CHATML,
    "exaone": EXAONE,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
}


def template_of(files: Files) -> str | None:
    """Return the chat template that a model's tokenizer has."""
    if JINJA in files:
        return text_of(files, JINJA)
    said = settings(files).get("chat_template")
    if isinstance(said, list):
        named = {part.get("name"): part.get("template") for part in said if isinstance(part, dict)}
        said = named.get("default")
    if said is None:
        said = settings(files, LEGACY).get("chat_template")
    return said if isinstance(said, str) and said.strip() else None


def most_common(templates: Sequence[tuple[str, str | None]]) -> tuple[str, str] | None:
    """Return the template that most models have and a note; of equally many, the first in order."""
    having = [(model, text) for model, text in templates if text is not None]
    if not having:
        return None
    counts = Counter(text.strip() for _, text in having)
    most = max(counts.values())
    winner = next(text for _, text in having if counts[text.strip()] == most)
    holders = [model for model, text in having if text.strip() == winner.strip()]
    tied = sum(number == most for number in counts.values()) > 1
    order = "; others have as many, and it comes first" if tied else ""
    return winner, f"chat_template: that of {', '.join(holders)}{order}"


def template_files(text: str, files: Files) -> dict[str, bytes]:
    """Return the files that change, for a tokenizer: where it keeps its template.

    One that keeps none gets chat_template.jinja.
    """
    found: dict[str, bytes] = {}
    for name in (SETTINGS, LEGACY):
        content = settings(files, name)
        if "chat_template" in content:
            content["chat_template"] = _placed(text, content["chat_template"])
            raw = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
            found[name] = raw.encode()
    if JINJA in files or not found:
        found[JINJA] = text.encode()
    return found


def _placed(text: str, before: Any) -> Any:
    """Put a template where one was: among several it is the one without a name of its own."""
    if not isinstance(before, list):
        return text
    rest = [part for part in before if isinstance(part, dict) and part.get("name") != "default"]
    return [{"name": "default", "template": text}, *rest]
