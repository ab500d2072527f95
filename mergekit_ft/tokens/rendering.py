"""Chat templates tried on a small conversation, in a sandbox like that of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from typing import Any, NoReturn

ASKED, TOLD, AGAIN = "What is a merge?", "Several models made one.", "Of how many?"


class Unrenderable(ValueError):
    """A template that does not render, and why."""


def rendered(template: str, specials: Mapping[str, str]) -> str:
    """Return a small conversation in a template; `Unrenderable` where a message does not appear."""
    compiled, reasons = parsed(template), list[str]()
    for parts in (False, True):  # templates of models that see images want content in parts
        try:
            text = compiled.render(
                messages=_messages(parts),
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **specials,
            )
        except Exception as error:  # whatever a template does
            reasons.append(str(error) or type(error).__name__)
            continue
        missing = [said for said in (ASKED, TOLD, AGAIN) if said not in text]
        if not missing:
            return str(text)
        reasons.append(f"a conversation comes out without {missing[0]!r}")
    raise Unrenderable(reasons[0])


def parsed(template: str) -> Any:
    """Return a template that can be rendered; `Unrenderable` where it is not Jinja."""
    import jinja2

    try:
        return _environment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise Unrenderable(f"line {error.lineno}: {error.message}") from None


def _messages(parts: bool) -> list[dict[str, Any]]:
    turns = (("user", ASKED), ("assistant", TOLD), ("user", AGAIN))
    return [
        {"role": role, "content": [{"type": "text", "text": said}] if parts else said}
        for role, said in turns
    ]


@cache
def _environment() -> Any:
    """Return the environment: blocks trimmed, loop controls, `generation`, nothing unsafe."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Passes through what stands between `generation` and `endgeneration`."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals |= {"raise_exception": _raise, "strftime_now": _now}
    return made


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=options.pop("ensure_ascii", False), **options)


def _raise(message: str) -> NoReturn:
    raise Unrenderable(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
