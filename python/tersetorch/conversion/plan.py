"""Choices that a person made: plan= instead of measuring."""

from __future__ import annotations

from collections.abc import Mapping

from tersetorch.conversion.candidates import Candidate
from tersetorch.conversion.planner import Decision
from tersetorch.conversion.swap import build
from tersetorch.conversion.walk import Site, current_format, label, why_not

Table = Mapping[str, Candidate]
SHOWN_NAMES = 8


def follow(
    plan: object, sites: list[Site], groups: list[list[Site]], table: Table, samples: list[int | None]
) -> list[Decision]:
    """What plan makes of each group of sites, laid out for so many samples (None: nobody knows).

    Raises:
        TypeError: plan is neither a string nor a mapping of strings to strings.
        ValueError: plan names a layer or format that does not exist, or asks for what is impossible.
    """
    if isinstance(plan, str):
        choices = _for_all(plan, groups, table)
    elif isinstance(plan, Mapping):
        choices = _by_name(plan, sites, groups, table)
    else:
        raise TypeError(
            "convert: plan must be a string or a dict of layer names to format names, "
            f"got {type(plan).__name__}; use report(fast).plan as an example"
        )
    return [
        _decision(choice, group, table, count) for choice, group, count in zip(choices, groups, samples, strict=True)
    ]


def _for_all(plan: str, groups: list[list[Site]], table: Table) -> list[tuple[str, str]]:
    rows = [row for row in table.values() if row.alias == plan != ""]
    if not rows:
        aliases = ", ".join(map(repr, dict.fromkeys(row.alias for row in table.values() if row.alias)))
        raise ValueError(
            f"convert: plan must be one of {aliases} or a dict of layer names, got {plan!r}; choose one of them"
        )
    choices = []
    for group in groups:
        mine = [row for row in rows if type(group[0].module) is row.source] or rows[:1]
        refused = {row.name: _refusal(row, group) for row in mine}
        able = [row for row in mine if refused[row.name] is None]
        if able:
            module = group[0].module
            smallest = min(able, key=lambda row: row.nbytes(module)) if len(able) > 1 else able[0]
            # Another product than of signs is another choice.
            unsigned = [f"{row.name}: {refused[row.name]}" for row in mine if row.signs and row not in able]
            choices.append((smallest.name, "; ".join(["asked for by plan", *unsigned])))
        else:
            choices.append(("dense", "; ".join(f"{name}: {reason}" for name, reason in refused.items())))
    return choices


def _by_name(
    plan: Mapping[str, str], sites: list[Site], groups: list[list[Site]], table: Table
) -> list[tuple[str, str]]:
    formats = ["dense", *table]
    by_name = {name: site for site in sites for name in site.names}
    wanted: dict[int, dict[str, str]] = {}
    for name, chosen in plan.items():
        site = by_name.get(name)
        if site is None:
            shown = ", ".join(repr(other) for other in list(by_name)[:SHOWN_NAMES]) or "none"
            raise ValueError(
                f"convert: plan must name layers that own a weight, got {name!r}; this model's are {shown}"
                f"{', ...' if len(by_name) > SHOWN_NAMES else ''}"
            )
        if chosen not in formats:
            raise ValueError(f"convert: plan must give {name!r} one of {formats}, got {chosen!r}; choose one of them")
        current = current_format(site.module, table)
        if site.kept is not None and chosen != current:
            raise ValueError(
                f"convert: plan must leave {label(name)!r} {current}, got {chosen!r}: {site.kept}; "
                "take it out of the plan"
            )
        if site.kept is None:
            wanted.setdefault(site.group, {})[name] = chosen
    choices = []
    for group in groups:
        asked = wanted.get(group[0].group, {})
        if len(set(asked.values())) > 1:
            raise ValueError(
                f"convert: plan must give layers that use one weight one format, got {asked}; make them the same"
            )
        if not asked:
            choices.append(("dense", "not in plan"))
            continue
        name, chosen = next(iter(asked.items()))
        refusal = _refusal(table[chosen], group) if chosen != "dense" else None
        if refusal is not None:
            raise ValueError(
                f"convert: plan must give {label(name)!r} a format that can hold it, got {chosen!r}: {refusal}; "
                "give it another one"
            )
        choices.append((chosen, "asked for by plan"))
    return choices


def _refusal(row: Candidate, group: list[Site]) -> str | None:
    for site in group:
        if type(site.module) is not row.source:
            return f"it runs a {row.source.__name__}, not a {type(site.module).__name__}"
    return why_not(row, group)


def _decision(choice: tuple[str, str], group: list[Site], table: Table, samples: int | None) -> Decision:
    chosen, reason = choice
    layers = [] if chosen == "dense" else build(table[chosen], [site.module for site in group], samples)
    return Decision(chosen, reason, layers)
