"""Each model under the donor's names and in its layout."""

from __future__ import annotations

from mergekit_ft.errors import SourceError
from mergekit_ft.plan import Entry, Reading, parts, referred
from mergekit_ft.plan.references import Key
from mergekit_ft.resolution.opening import Opened
from mergekit_ft.sources import Source
from mergekit_ft.sources.names import brought


def renamed(reading: Reading, sources: Opened) -> Opened:
    """Return every model under the names of the first, the donor of names."""
    assert reading.plan is not None
    told = {
        item.model.key: ((*part.path, i, "prefix"), item.prefix)
        for part in parts(reading.plan)
        for i, item in enumerate(part.items)
        if isinstance(item, Entry) and item.prefix is not None
    }
    named = list(referred(reading.plan))
    donor = sources[named[0][1].key]
    found: dict[Key, Source] = dict(sources)
    for path, model in named:
        if sources[model.key] is donor:
            if model.key in told:
                message = "prefix has no effect here: the names of this model are the output's"
                reading.add(told[model.key][0], message, key=True)
            continue
        at, prefixes = told.get(model.key, (path, None))
        try:
            found[model.key] = brought(sources[model.key], donor, prefixes)
        except SourceError as error:
            reading.add(at, str(error), kind="source")
            reading.unfit.add(model.key)
    return found
