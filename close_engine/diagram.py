"""The state diagram, drawn from the transition table: as Mermaid's text, and as a picture.

Both have the same arrows. Only where they run in the picture is written here by hand; an arrow of the table that has no
place, or a place without an arrow, fails a test.

>>> print(mermaid().splitlines()[1].strip())
[*] --> INITIATED
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import NamedTuple

from close_engine.machine import TRANSITIONS
from close_engine.stages import ACTIVE_STAGES, Stage

__all__ = ["mermaid", "svg"]

ACTIVE = "ACTIVE"
WHERE_THINGS_STAND = "WHERE_THINGS_STAND"

#: What the two names mean that are not stages.
GROUPS = {ACTIVE: "any active stage", WHERE_THINGS_STAND: "where things stand"}


class Arrow(NamedTuple):
    """One arrow of the diagram. A trigger of every active stage is one arrow, from their group."""

    trigger: str
    source: str
    dest: str


def arrows() -> Iterator[Arrow]:
    """Yield the arrows of the diagram, in the table's order."""
    for transition in TRANSITIONS:
        sources: tuple[str, ...] = transition.sources
        if set(ACTIVE_STAGES) <= set(sources):
            sources = (ACTIVE, *(stage for stage in sources if stage not in ACTIVE_STAGES))
        for source in sources:
            yield Arrow(transition.trigger, str(source), str(transition.dest or WHERE_THINGS_STAND))


def mermaid() -> str:
    """Draw the state diagram in Mermaid's syntax."""
    inside: list[str] = []
    outside: list[str] = []
    for trigger, source, dest in arrows():
        within = source in ACTIVE_STAGES and dest in ACTIVE_STAGES
        (inside if within else outside).append(f"{source} --> {dest}: {trigger}")
    group = [
        f'state "{GROUPS[ACTIVE]}" as {ACTIVE} {{',
        f'    state "{GROUPS[WHERE_THINGS_STAND]}" as {WHERE_THINGS_STAND}',
        *(f"    {arrow}" for arrow in inside),
        "}",
    ]
    lines = [f"[*] --> {Stage.INITIATED}", *group, *outside, f"{Stage.COMPLETED} --> [*]"]
    return "\n".join(["stateDiagram-v2", *(f"    {line}" for line in lines)])


#: The middle of each stage's box.
PLACES: dict[Stage, tuple[int, int]] = {
    Stage.INITIATED: (94, 84),
    Stage.QUALIFYING: (94, 162),
    Stage.COLLECTING_INFO: (328, 162),
    Stage.BUILDING: (94, 240),
    Stage.PREVIEW_SENT: (94, 330),
    Stage.EDIT_LOOP: (328, 330),
    Stage.PENDING_APPROVAL: (328, 438),
    Stage.PAYMENT_SENT: (94, 546),
    Stage.STALLED: (211, 692),
    Stage.COMPLETED: (94, 800),
    Stage.CLOSED_LOST: (328, 800),
}


class Route(NamedTuple):
    """Where an arrow runs, and where its name is: left-aligned there, or as `anchor` says."""

    path: str
    label: tuple[int, int]
    anchor: str = "start"


ROUTES: dict[Arrow, Route] = {
    Arrow("start_qualifying", "INITIATED", "QUALIFYING"): Route("M94 101V144", (102, 127)),
    Arrow("collect_info", "QUALIFYING", "COLLECTING_INFO"): Route("M164 162H257", (211, 155), "middle"),
    Arrow("start_building", "QUALIFYING", "BUILDING"): Route("M94 179V222", (102, 205)),
    Arrow("start_building", "COLLECTING_INFO", "BUILDING"): Route("M328 179V240H165", (320, 233), "end"),
    Arrow("send_preview", "BUILDING", "PREVIEW_SENT"): Route("M94 257V312", (102, 289)),
    Arrow("send_preview", "EDIT_LOOP", "PREVIEW_SENT"): Route("M258 338H165", (211, 353), "middle"),
    Arrow("request_edits", "PREVIEW_SENT", "EDIT_LOOP"): Route("M164 322H257", (211, 315), "middle"),
    Arrow("request_approval", "PREVIEW_SENT", "PENDING_APPROVAL"): Route("M144 347V430H257", (152, 423)),
    Arrow("request_approval", "EDIT_LOOP", "PENDING_APPROVAL"): Route("M328 347V420", (320, 388), "end"),
    Arrow("withdraw_approval", "PENDING_APPROVAL", "PREVIEW_SENT"): Route("M258 446H120V348", (128, 461)),
    Arrow("send_payment_link", "PREVIEW_SENT", "PAYMENT_SENT"): Route("M60 347V528", (68, 500)),
    Arrow("send_payment_link", "EDIT_LOOP", "PAYMENT_SENT"): Route("M398 330H410V554H165", (400, 569), "end"),
    Arrow("send_payment_link", "PENDING_APPROVAL", "PAYMENT_SENT"): Route("M328 455V538H165", (320, 531), "end"),
    Arrow("complete", ACTIVE, "COMPLETED"): Route("M50 590V782", (58, 650)),
    Arrow("complete", "STALLED", "COMPLETED"): Route("M141 692H124V782", (132, 740)),
    Arrow("complete", "CLOSED_LOST", "COMPLETED"): Route("M258 800H165", (211, 793), "middle"),
    Arrow("stall", ACTIVE, "STALLED"): Route("M190 590V674", (182, 650), "end"),
    Arrow("resume", "STALLED", WHERE_THINGS_STAND): Route("M232 675V591", (240, 628)),
    Arrow("close_lost", ACTIVE, "CLOSED_LOST"): Route("M388 590V782", (380, 668), "end"),
    Arrow("close_lost", "STALLED", "CLOSED_LOST"): Route("M281 692H298V782", (290, 740), "end"),
    Arrow("reopen", "CLOSED_LOST", "INITIATED"): Route("M398 800H436V84H165", (410, 77), "end"),
}

WIDTH, HEIGHT, BOX, LINE = 448, 832, 140, 34

#: The colours follow the reader's system; a page may set the three variables itself.
STYLE = """\
.stages{--ink:#1f2937;--line:#64748b;--box:#eef2ff;font:12px system-ui,sans-serif}
@media(prefers-color-scheme:dark){.stages{--ink:#e5e7eb;--line:#94a3b8;--box:#2b3350}}
.stages text{fill:var(--ink);stroke:none}
.stages .name{font-weight:600;font-size:11.5px;text-anchor:middle}
.stages .small{font-size:11px}
.stages rect{fill:var(--box);stroke:var(--line)}
.stages .group{fill:none;stroke-dasharray:5 4}
.stages path{fill:none;stroke:var(--line);stroke-width:1.3}
.stages .dot,.stages marker path{fill:var(--line);stroke:none}"""


def svg() -> str:
    """Draw the state diagram as an SVG picture, with a text that says the same."""
    drawn = list(arrows())
    named = {**GROUPS, **{str(stage): str(stage) for stage in Stage}}
    spoken = [f"{trigger}: from {named[source]} to {named[dest]}" for trigger, source, dest in drawn]
    lines = [
        f'<svg class="stages" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-labelledby="stages-title stages-text">',
        '<title id="stages-title">The stages of a close conversation, and the triggers between them</title>',
        f'<desc id="stages-text">It begins in INITIATED and ends in COMPLETED. {escape("; ".join(spoken))}.</desc>',
        f"<style>{STYLE}</style>",
        '<defs><marker id="stages-tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto-start-reverse"><path d="M0 0L8 4L0 8Z"/></marker></defs>',
        '<rect class="group" x="12" y="40" width="408" height="550" rx="10"/>',
        f'<text x="118" y="58">{GROUPS[ACTIVE]}</text>',
        f'<text class="small" x="240" y="644">to {GROUPS[WHERE_THINGS_STAND]}</text>',
        '<circle class="dot" cx="94" cy="14" r="6"/>',
        '<path d="M94 20V66" marker-end="url(#stages-tip)"/>',
    ]
    for arrow, said in zip(drawn, spoken, strict=True):
        path, (x, y), anchor = ROUTES[arrow]
        lines.append(
            f'<g class="arrow"><title>{said}</title><path d="{path}" marker-end="url(#stages-tip)"/>'
            f'<text x="{x}" y="{y}" text-anchor="{anchor}">{arrow.trigger}</text></g>'
        )
    for stage, (x, y) in PLACES.items():
        lines += [
            f'<rect x="{x - BOX // 2}" y="{y - LINE // 2}" width="{BOX}" height="{LINE}" rx="6"/>',
            f'<text class="name" x="{x}" y="{y + 4}">{stage}</text>',
        ]
    return "\n".join([*lines, "</svg>"])
