"""Chat templates: chosen, tried on a conversation, and put where the tokenizer keeps its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergekit_ft.plan.tokenizers import TEMPLATES
from mergekit_ft.tokens.rendering import Unrenderable, rendered
from mergekit_ft.tokens.templates import NAMED
from tests.small_models import cli, hashes, merged, no_reading, refused
from tests.vocabularies import linear, words, write_model

SIMPLE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
OTHER = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
EXPECTED = {  # by the formats' public descriptions
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n"
    "### Instruction:\nBye\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    "<|im_start|>assistant\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n"
    "[|user|]Bye\n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]",
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def three(*templates: str | None) -> str:
    """Write models with these templates in tokenizer_config.json; return a plan's beginning."""
    for number, (name, text) in enumerate(zip(("a", "b", "c"), templates, strict=False)):
        settings: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
        settings |= {} if text is None else {"chat_template": text}
        tokenizer = words("x", "cat", added=["<s>", "</s>"])
        write_model(Path(name), number, tokenizer, settings=settings)
    return linear(*[0.5] * len(templates), more="chat_template: ")


def settings(folder: str = "out") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "tokenizer_config.json").read_text())
    return found


def test_the_names_of_a_plan_are_those_that_have_a_text() -> None:
    assert set(TEMPLATES) == set(NAMED) == set(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_named_template_is_read_by_transformers_and_says_what_the_format_says(name: str) -> None:
    from transformers import AutoTokenizer

    merged(three(None, None) + name + "\n")
    assert Path("out/chat_template.jinja").read_text() == NAMED[name]
    read = AutoTokenizer.from_pretrained("out")
    text = read.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    assert text == EXPECTED[name]


def test_a_text_goes_where_the_tokenizer_keeps_its_template() -> None:
    plan = three(OTHER, None) + json.dumps(SIMPLE) + "\n"
    merged(plan)
    assert settings()["chat_template"] == SIMPLE
    assert settings() | {"chat_template": 0} == settings("a") | {"chat_template": 0}
    assert not Path("out/chat_template.jinja").exists()
    Path("a/chat_template.jinja").write_text(OTHER)
    merged(plan, "second")
    assert Path("second/chat_template.jinja").read_text() == SIMPLE
    assert settings("second")["chat_template"] == SIMPLE


def test_of_templates_by_name_the_default_one_is_replaced() -> None:
    plan = three(None, None) + json.dumps(SIMPLE) + "\n"
    tools = {"name": "tool_use", "template": OTHER}
    listed = [{"name": "default", "template": OTHER}, tools]
    Path("a/tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    merged(plan)
    assert settings()["chat_template"] == [{"name": "default", "template": SIMPLE}, tools]


def test_auto_takes_what_most_models_have() -> None:
    said = merged(three(SIMPLE, OTHER, OTHER + "\n") + "auto\n").output
    assert settings()["chat_template"] == OTHER
    assert "chat_template: that of ./b, ./c" in said


def test_auto_takes_the_first_of_equally_many_and_says_so() -> None:
    said = merged(three(None, OTHER, SIMPLE) + "auto\n").output
    assert Path("out/chat_template.jinja").read_text() == OTHER
    assert "chat_template: that of ./b; others have as many, and it comes first" in said


def test_a_template_that_the_base_has_already_leaves_its_files_alone() -> None:
    merged(three(SIMPLE, SIMPLE) + "auto\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert Path("out", name).read_bytes() == Path("a", name).read_bytes()


def test_auto_without_any_template_is_refused() -> None:
    plan = three(None, None) + "auto\n"
    refused(3, "no model has a chat template (./a, ./b); name one", plan)
    said = merged(plan, "out", "--lenient").output  # mergekit sets none then
    assert "no model has a chat template" in said and "(set aside)" in said


def test_a_template_for_no_tokenizer_is_refused() -> None:
    plan = three(None, None) + "chatml\n"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path("a", name).unlink()
    refused(3, "./a has no tokenizer that a chat template could belong to", plan)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{% for m in messages %}{{ m.content }}", "line 1: Unexpected end of template"),
        ("{{ raise_exception('never') }}", "never"),
        ("{{ messages[0]['content'] }}", "comes out without 'Several models made one.'"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{% set x = messages.append(1) %}{{ messages }}", "unsafe"),
        ("{{ nothing.at.all }}", "undefined"),
    ],
)
def test_a_template_that_does_not_render_is_a_fault_before_any_weight(
    text: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = three(SIMPLE, None) + json.dumps(text) + "\n"
    no_reading(monkeypatch)
    line = refused(3, "this chat template does not render", plan)
    assert said in line
    assert line.startswith("plan:7:16:")


def test_a_faulty_template_is_in_the_report_that_names_a_missing_model() -> None:
    plan = three(SIMPLE, None).replace("./b", "./nowhere") + "'{% for m in messages %}'\n"
    result = cli("check", "-", text=plan)
    assert result.exit_code == 3
    assert "./nowhere" in result.stderr and "this chat template does not render" in result.stderr


def test_what_transformers_knows_is_known_in_templates() -> None:
    known = """{% for m in messages %}{% if not m %}{% break %}{% endif %}
    {%- generation %}{{ m | tojson }}{% endgeneration %}{{ strftime_now('%Y') }}
    {%- if not tools %}!{% endif %}{{ bos_token }}{% endfor %}"""
    assert '{"role": "user", "content": "Of how many?"}' in rendered(known, {"bos_token": "<s>"})


def test_a_template_may_want_content_in_parts() -> None:
    inner = "{% for p in m.content %}{{ p['text'] + '' }}{% endfor %}"
    parts = f"{{% for m in messages %}}{inner}{{% endfor %}}"
    assert "Of how many?" in rendered(parts, {})
    with pytest.raises(Unrenderable, match="without"):
        rendered("{{ messages[0] }}", {})


def test_markers_that_are_no_tokens_are_told() -> None:
    said = merged(three(None, None) + "chatml\n").output
    assert "chat_template: 2 tokens ('<|im_start|>', '<|im_end|>') not in the vocabulary" in said


def test_a_template_joins_a_union() -> None:
    plan = three(None, None)
    write_model(Path("b"), 2, words("x", "dog", added=["<|im_start|>", "<|im_end|>"]))
    said = merged(plan + "chatml\ntokenizer: {source: union}\n").output
    assert "not in the vocabulary" not in said
    assert Path("out/chat_template.jinja").read_text() == NAMED["chatml"]


def test_a_template_comes_with_the_tokenizer_of_another_model() -> None:
    plan = three(SIMPLE, OTHER) + "auto\ntokenizer: {source: ./b}\n"
    Path("b/chat_template.jinja").write_text(SIMPLE + "{# b #}")
    merged(plan)
    assert settings()["chat_template"] == SIMPLE
    assert Path("out/chat_template.jinja").read_text() == SIMPLE
    assert cli("verify", "out", "--full").exit_code == 0
    assert hashes("out")["tokenizer.json"] == hashes("b")["tokenizer.json"]
