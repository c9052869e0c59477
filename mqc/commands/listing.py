"""``mqc passes`` and ``mqc targets``: what there is to choose from."""

from __future__ import annotations

from typing import Annotated

import typer

from mqc.commands import _common as common


def passes_command(
    scheme: Annotated[
        str | None, typer.Option(help="Show the default pipeline of this scheme only.")
    ] = None,
    as_json: common.Json = False,
) -> None:
    """List the passes, in the order in which a compile runs them.

    Example: mqc passes --scheme w4a16
    """
    from mqc.pipeline import known_passes, pass_names
    from mqc.spec import named_scheme

    chosen = pass_names(named_scheme(scheme)) if scheme else None
    full = pass_names(named_scheme("w4a8"))
    known = known_passes()
    order = chosen if chosen is not None else [*full, *(set(known) - set(full))]
    entries = [
        {
            "name": name,
            "preserves": known[name].preserves,
            "after": list(known[name].after),
            "summary": known[name].summary(),
        }
        for name in order
    ]
    if as_json:
        common.print_json(entries)
        return
    rows = [
        [entry["name"], "preserved" if entry["preserves"] else "", entry["summary"]]
        for entry in entries
    ]
    common.stdout().print(common.table("passes", ["pass", "function", "what it does"], rows))


def targets_command(as_json: common.Json = False) -> None:
    """List the targets, and whether they can be used here.

    Example: mqc targets
    """
    from mqc.backends.registry import get_target, target_names

    entries = []
    for name in target_names():
        target = get_target(name)
        reason = target.available()
        entries.append(
            {
                "name": name,
                "description": target.description,
                "available": reason is None,
                "reason": reason,
            }
        )
    if as_json:
        common.print_json(entries)
        return
    rows = [
        [entry["name"], "yes" if entry["available"] else entry["reason"], entry["description"]]
        for entry in entries
    ]
    common.stdout().print(common.table("targets", ["target", "usable here", "what it is"], rows))
