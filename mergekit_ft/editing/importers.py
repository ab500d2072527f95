"""Layouts of edit data that others publish -> our keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_ft.registry import did_you_mean

Words = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """How rows of one kind are written."""

    name: str
    marks: frozenset[str]  # keys that say it is this one
    keys: frozenset[str]  # that are read
    idle: frozenset[str]  # that are known, and of no use to an edit
    read: Callable[[Words], dict[str, Any]]

    @property
    def all(self) -> frozenset[str]:
        """Return every key that a row may have."""
        return self.marks | self.keys | self.idle


def layout_of(words: Words) -> Layout:
    """Return the layout of a row; ValueError where none, or more than one, fits its keys."""
    fitting = [layout for layout in LAYOUTS if layout.marks <= words.keys()]
    if not fitting:
        known = sorted({key for layout in LAYOUTS for key in layout.marks})
        strange = [key for key in words if key not in known]
        hint = next(filter(None, (did_you_mean(key, known) for key in strange)), "")
        told = "; ".join(f"{layout.name}: {_listed(layout.marks)}" for layout in LAYOUTS)
        raise ValueError(f"keys {_listed(words)} are of no edit{hint} (it has {told})")
    whole = [layout for layout in fitting if words.keys() <= layout.all]
    if len(whole) == 1:
        return whole[0]
    if len(fitting) > 1:
        names = " and ".join(layout.name for layout in fitting)
        raise ValueError(f"keys {_listed(words)} are those of {names}: keep those of one")
    layout = fitting[0]
    key = next(key for key in words if key not in layout.all)
    hint = did_you_mean(key, layout.all)
    raise ValueError(f"unknown key '{key}'{hint} ({layout.name} has {_listed(layout.all)})")


def _listed(keys: Any) -> str:
    return ", ".join(sorted(map(str, keys))) or "none"


def _ours(words: Words) -> dict[str, Any]:
    return dict(words)


def _zsre(words: Words) -> dict[str, Any]:
    found = _named(words, prompt="src", target="alt")
    found["rephrase"] = _texts(words, "rephrase")
    found["locality"] = list(_pair(words, "loc", "loc_ans"))
    found["portability"] = list(_posed(words.get("portability")))
    return found


def _wikibigedit(words: Words) -> dict[str, Any]:
    found = _named(words, prompt="update", target="ans")
    found["rephrase"] = [*_texts(words, "rephrase"), *_texts(words, "personas")]
    found["locality"] = list(_pair(words, "loc", "loc_ans"))
    found["portability"] = list(_pair(words, "mhop", "mhop_ans", needed=True))
    return found


def _flat(words: Words) -> dict[str, Any]:
    """Read CounterFact and WikiBigEdit as editors' benchmarks flatten them, and KnowEdit."""
    found = _named(words, prompt="prompt", target="target_new")
    found["rephrase"] = [*_texts(words, "rephrase_prompt"), *_texts(words, "rephrase")]
    found["locality"] = [
        *_pair(words, "locality_prompt", "locality_ground_truth"),
        *_groups(words, "locality"),
    ]
    found["portability"] = [
        *_pair(words, "portability_prompt", "portability_ground_truth", needed=True),
        *_groups(words, "portability"),
    ]
    return found


def _counterfact(words: Words) -> dict[str, Any]:
    asked = words["requested_rewrite"]
    if not isinstance(asked, dict) or not {"prompt", "target_new", "subject"} <= asked.keys():
        raise ValueError("requested_rewrite needs prompt, target_new and subject")
    prompt, subject, target = asked["prompt"], asked["subject"], asked["target_new"]
    if not isinstance(prompt, str) or prompt.count("{}") != 1 or not isinstance(subject, str):
        raise ValueError("requested_rewrite: prompt is text with one {} where the subject stands")
    true = _string(asked.get("target_true"))
    near = [
        {"prompt": text} | ({} if true is None else {"answer": true})
        for text in _texts(words, "neighborhood_prompts")
    ]
    return {
        **_named(words),
        "prompt": prompt.replace("{}", subject),
        "target": _string(target),
        "subject": subject,
        "rephrase": _texts(words, "paraphrase_prompts"),
        "locality": near,
    }


def _string(target: Any) -> Any:
    return target.get("str") if isinstance(target, dict) else target


def _named(words: Words, **names: str) -> dict[str, Any]:
    """Return the keys that all layouts share, and some by their names here."""
    found = {ours: words[theirs] for ours, theirs in names.items()}
    if words.get("subject"):
        found["subject"] = words["subject"]
    name = words.get("case_id", words.get("id"))
    return found if name is None else found | {"id": name}


def _texts(words: Words, key: str) -> list[Any]:
    """Return a text, or a list of them, as a list; nothing, and empty texts, as none."""
    given = words.get(key)
    return [
        text for text in (given if isinstance(given, list) else [given]) if text not in (None, "")
    ]


def _pair(
    words: Words, prompt: str, answer: str, *, needed: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield a prompt and its answers, where there are some."""
    answers = _flattened(words.get(answer))
    for text in _texts(words, prompt):
        if answers or not needed:
            yield {"prompt": text} | ({"answer": answers} if answers else {})


def _groups(words: Words, key: str) -> Iterator[dict[str, Any]]:
    """Yield what stands under each name of {name: [{prompt, ground_truth}]}."""
    given = words.get(key)
    if not isinstance(given, dict | None):
        raise ValueError(f'{key} is {{name: [{{"prompt": ..., "ground_truth": ...}}]}}')
    for name, group in (given or {}).items():
        for item in group if isinstance(group, list) else [group]:
            if item is None:
                continue
            if not isinstance(item, dict) or not {"prompt", "ground_truth"} <= item.keys():
                raise ValueError(f"{key}: {name} is a list of prompt and ground_truth")
            prompts, truths = _texts(item, "prompt"), item["ground_truth"]
            apart = isinstance(truths, list) and len(prompts) > 1
            if apart and len(truths) != len(prompts):
                raise ValueError(f"{key}: {name} has {len(prompts)} prompts, {len(truths)} answers")
            for place, prompt in enumerate(prompts):
                answers = _flattened(truths[place] if apart else truths)
                if answers or key == "locality":
                    yield {"prompt": prompt} | ({"answer": answers} if answers else {})


def _posed(given: Any) -> Iterator[dict[str, Any]]:
    """Yield the one question of EasyEdit's ZsRE."""
    if given in (None, {}):
        return
    if not isinstance(given, dict) or not {"New Question", "New Answer"} <= given.keys():
        raise ValueError("portability of ZsRE has New Question and New Answer")
    yield {"prompt": given["New Question"], "answer": given["New Answer"]}


def _flattened(answers: Any) -> list[Any]:
    """Return right answers, which may be lists of lists, empty ones left out."""
    if isinstance(answers, list):
        return [text for answer in answers for text in _flattened(answer)]
    return [] if answers is None or answers == "" else [answers]


def _layout(
    name: str, marks: str, keys: str, idle: str, read: Callable[[Words], dict[str, Any]]
) -> Layout:
    wanted, more, useless = (frozenset(part.split()) for part in (marks, keys, idle))
    return Layout(name, wanted, more, useless, read)


LAYOUTS = (
    _layout("ours", "prompt target", "id subject rephrase locality portability weight", "", _ours),
    _layout(
        "ZsRE", "src alt", "subject rephrase loc loc_ans portability case_id",
        "answers pred cond", _zsre,
    ),
    _layout(
        "WikiBigEdit", "update ans",
        "subject rephrase personas loc loc_ans mhop mhop_ans case_id",
        "tag relation object subject_id relation_id object_id", _wikibigedit,
    ),
    _layout(
        "CounterFact or KnowEdit", "prompt target_new",
        "subject rephrase_prompt rephrase locality_prompt locality_ground_truth locality "
        "portability_prompt portability_ground_truth portability case_id id",
        "ground_truth cond tag relation object answers pred target_true", _flat,
    ),
    _layout(
        "CounterFact, nested", "requested_rewrite",
        "paraphrase_prompts neighborhood_prompts case_id",
        "pararel_idx attribute_prompts generation_prompts", _counterfact,
    ),
)  # fmt: skip
