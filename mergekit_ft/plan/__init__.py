"""Words: what a plan says, where it says it, and what is wrong with it. Knows no tensors."""

from mergekit_ft.plan.entries import Entry
from mergekit_ft.plan.models import Plan, Step
from mergekit_ft.plan.parameters import Lookup
from mergekit_ft.plan.parts import Part, parts, referred
from mergekit_ft.plan.reader import read
from mergekit_ft.plan.reading import Reading
from mergekit_ft.plan.references import ModelReference
from mergekit_ft.plan.schema import schema
from mergekit_ft.plan.stages import nearest_stage

__all__ = [
    "Entry",
    "Lookup",
    "ModelReference",
    "Part",
    "Plan",
    "Reading",
    "Step",
    "nearest_stage",
    "parts",
    "read",
    "referred",
    "schema",
]
