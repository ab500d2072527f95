"""Write the order task: `python -m examples.two_experts.make_data`.

A sentence about an order becomes a record of four fields. Names and goods of the held-out items
never occur in training, and half of the held-out sentences follow patterns new to the model.
The triage task (`triage.*.jsonl`) and `neutral.txt` were written by hand and have no generator.
"""

import json
import random
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

DATA = Path(__file__).parent / "data"
ASK = "Write this order as a record.\n"


def words(text: str) -> list[str]:
    """Cut a text at its blanks."""
    return text.split()


NUMBERS = words("two three four five six seven eight nine ten eleven twelve")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")


class Stock(NamedTuple):
    """Name what the sentences of one split are built from."""

    names: list[str]
    goods: list[str]
    patterns: list[str]


TRAIN = Stock(
    words(
        """Anna Boris Clara David Edith Felix Greta Hugo Ines Jonas Katya Liam Maria Nils Olga Pedro
        Agnes Bruno Celia Dario Emil Flora Gustav Hanna Ivan Julia Kamal Leila Mirko Nora Oscar"""
    ),
    words(
        """lamps chairs books plates pencils hammers candles mugs scarves baskets mirrors stamps
        gloves pillows buckets drums pears brooms saws rings melons curtains tents buttons"""
    ),
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
HELD_OUT = Stock(
    words("Quentin Rosa Stefan Tilda Ulrich Vera Walter Yusuf"),
    words("bottles carpets spoons kettles violins ladders towels clocks"),
    [
        *TRAIN.patterns[:4],
        "If {name} comes on {day}, hand over {number} {goods}.",
        "The van takes {number} {goods} to {name} this {day}.",
        "Put aside {number} {goods} until {day}, {name} will fetch them.",
        "Next {day} a parcel with {number} {goods} goes to {name}.",
    ],
)


def order(stock: Stock, pattern: str, dice: random.Random) -> dict[str, str]:
    """Draw one order and say it as a sentence and as a record."""
    name, goods, day = dice.choice(stock.names), dice.choice(stock.goods), dice.choice(DAYS)
    count = dice.randrange(len(NUMBERS))
    said = pattern.format(name=name, goods=goods, day=day, number=NUMBERS[count])
    record = f"day={day[:3].lower()} | count={count + 2} | goods={goods} | name={name}"
    return {"prompt": ASK + said[0].upper() + said[1:], "answer": record}


def orders(stock: Stock, count: int, seed: int) -> list[dict[str, str]]:
    """Draw `count` different orders, as many of each pattern."""
    dice = random.Random(seed)
    items = [order(stock, pattern, dice) for pattern in islice(cycle(stock.patterns), count)]
    drawn = {item["prompt"]: item for item in items}
    if len(drawn) < count:
        raise ValueError(f"seed {seed} draws the same sentence twice; take another")
    return dice.sample(items, count)


def main() -> None:
    """Write the two splits of the order task."""
    for split, stock, count, seed in (("train", TRAIN, 240, 11), ("heldout", HELD_OUT, 64, 23)):
        lines = [json.dumps(item) + "\n" for item in orders(stock, count, seed)]
        (DATA / f"orders.{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
