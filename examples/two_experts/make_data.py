"""Write the order task: `python -m examples.two_experts.make_data`.

A sentence about an order becomes a record of four fields. Names and goods of the held-out items never
occur in training, and half of the held-out sentences follow patterns that training has not seen.
The triage task (`triage.*.jsonl`) and `neutral.txt` were written by hand and have no generator.
"""

import json
import random
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

DATA = Path(__file__).parent / "data"
ASK = "Write this order as a record.\n"
NUMBERS = "two three four five six seven eight nine ten eleven twelve".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


class Words(NamedTuple):
    """Name what the sentences of one split are built from."""

    names: list[str]
    goods: list[str]
    patterns: list[str]


TRAIN = Words(
    (
        "Anna Boris Clara David Edith Felix Greta Hugo Ines Jonas Katya Liam Maria Nils Olga Pedro "
        "Agnes Bruno Celia Dario Emil Flora Gustav Hanna Ivan Julia Kamal Leila Mirko Nora Oscar Paula"
    ).split(),
    (
        "lamps chairs books plates pencils hammers candles mugs scarves baskets mirrors stamps "
        "gloves pillows buckets drums pears brooms saws rings melons curtains tents buttons"
    ).split(),
    [
        "{name} would like {number} {goods} by {day}.",
        "Please send {number} {goods} to {name} on {day}.",
        "On {day} {name} picked up {number} {goods}.",
        "{number} {goods} are for {name}, who comes on {day}.",
        "{day} is the day when {name} needs {number} {goods}.",
        "For {name}: {number} {goods}, to be ready on {day}.",
        "We promised {name} {number} {goods} for {day}.",
        "{name} called and asked for {number} {goods}, best on {day}.",
    ],
)
HELD_OUT = Words(
    "Quentin Rosa Stefan Tilda Ulrich Vera Walter Yusuf".split(),
    "bottles carpets spoons kettles violins ladders towels clocks".split(),
    [
        *TRAIN.patterns[:4],
        "If {name} comes on {day}, hand over {number} {goods}.",
        "The van takes {number} {goods} to {name} this {day}.",
        "Put aside {number} {goods} until {day}, {name} will fetch them.",
        "Next {day} a parcel with {number} {goods} goes to {name}.",
    ],
)


def order(words: Words, pattern: str, dice: random.Random) -> dict[str, str]:
    """Draw one order and say it as a sentence and as a record."""
    name, goods, day = dice.choice(words.names), dice.choice(words.goods), dice.choice(DAYS)
    count = dice.randrange(len(NUMBERS))
    said = pattern.format(name=name, goods=goods, day=day, number=NUMBERS[count])
    record = f"day={day[:3].lower()} | count={count + 2} | goods={goods} | name={name}"
    return {"prompt": ASK + said[0].upper() + said[1:], "answer": record}


def orders(words: Words, count: int, seed: int) -> list[dict[str, str]]:
    """Draw `count` different orders, as many of each pattern."""
    dice = random.Random(seed)
    patterns = cycle(words.patterns)
    drawn = {item["prompt"]: item for item in (order(words, p, dice) for p in islice(patterns, count))}
    if len(drawn) < count:
        raise ValueError(f"seed {seed} draws the same sentence twice; take another")
    return dice.sample(list(drawn.values()), count)


def main() -> None:
    """Write the two splits of the order task."""
    for split, words, count, seed in (("train", TRAIN, 240, 11), ("heldout", HELD_OUT, 64, 23)):
        lines = [json.dumps(item) + "\n" for item in orders(words, count, seed)]
        (DATA / f"orders.{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
