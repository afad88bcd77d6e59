"""Draw docs/images/architecture.svg from the sources: packages, their imports, and the threads of a step.

Packages and arrows come from the import statements, threads from the calls that start them. The functions
that a step passes are listed in PATH; one that no longer exists is an error that says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from structure import CLIENT, SERVER, Packages, names, threads

PATH = (
    (
        "caller's thread (gRPC worker)",
        (
            ("rpc/service.py", "TrainingService.TrainStep", "decode and check the request"),
            ("engine/engine.py", "Engine.train_step", "hand it in, return a future"),
            ("engine/admission.py", "StepAdmission.admit", "join a retry, or answer it, or queue"),
        ),
    ),
    (
        "maskwire-executor",
        (
            ("engine/executor.py", "Executor._next", "take the step, number it"),
            ("engine/executor.py", "Executor._compute", "train, on the device"),
            ("engine/executor.py", "Executor._consume", "extend the digest"),
        ),
    ),
    (
        "maskwire-committer",
        (
            ("engine/committer.py", "Committer._write_all", "one transaction for all that waits"),
            ("engine/commits.py", "StepCommit.write", "record and batch"),
            ("engine/commits.py", "StepCommit.committed", "answer the futures"),
        ),
    ),
)
"""The threads of a step: module, function and what it does."""

Point = tuple[float, float]

SERVER_PLACES: dict[str, Point] = {
    "cli": (700, 0), "app": (450, 0), "rpc": (0, 130), "engine": (215, 130), "recovery": (480, 130),
    "training": (780, 130), "checkpoints": (215, 240), "journal": (480, 240),
}  # fmt: skip
CLIENT_PLACES: dict[str, Point] = {
    "cli": (0, 60), "client, aio": (220, 60), "protocol": (440, 60), "data": (700, 10), "loggers": (700, 110),
    "v1": (440, 160),
}  # fmt: skip
RUN = ("engine", "recovery", "checkpoints", "journal")
CLIENTS = ("client", "aio")

WIDTH, MARGIN = 980, 30
BOX_W, BOX_H = 140, 44
INK, LINE, FAINT = "#1f2328", "#57606a", "#d0d7de"
FILLS = {
    "rpc": "#dbeafe", "training": "#dcfce7", "cli": "#f1f5f9", "app": "#f1f5f9", "v1": "#fae8ff",
    "values": "#f8fafc", "run": "#fff7ed",
}  # fmt: skip


class Drawing:
    """An SVG under construction."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: int = 13,
        color: str = INK,
        style: str = "",
        middle: bool = False,
    ) -> None:
        """A line of text; `style` is more attributes."""
        anchor = ' text-anchor="middle"' if middle else ""
        self.lines.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}"{anchor}{style}>{escape(words)}</text>'
        )

    def box(self, x: float, y: float, w: float, h: float, fill: str, *, dashed: bool = False) -> None:
        """A rectangle with round corners."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.lines.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="7" fill="{fill}" stroke="{LINE}"{dash}/>'
        )

    def arrow(self, path: str, *, both: bool = False) -> None:
        """A line with a head at its end."""
        start = ' marker-start="url(#head)"' if both else ""
        self.lines.append(
            f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.4" marker-end="url(#head)"{start}/>'
        )

    def svg(self, height: float) -> str:
        """The document, on a background of its own, so that it can be read on a dark page too."""
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" '
                f'height="{height:g}" font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
                "<title>Threads and packages of maskwire</title>",
                "<!-- Made by docs/generate.py (`make docs`) from the sources. -->",
                '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
                f'orient="auto-start-reverse"><path d="M0 0 L8 4 L0 8 z" fill="{LINE}"/></marker></defs>',
                f'<rect width="{WIDTH}" height="{height:g}" rx="10" fill="#ffffff" stroke="{FAINT}"/>',
                *self.lines,
                "</svg>\n",
            ]
        )


BOLD = ' font-weight="600"'
MONO = ' font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"'


def draw_threads(drawing: Drawing, top: float) -> float:
    """The three threads of a step, side by side; where the picture ends."""
    started = threads()
    drawing.text(
        MARGIN, top + 8, "A training step passes three threads in one direction", size=17, style=BOLD
    )
    lane, gap = 268, 58
    y = top + 28
    for number, (thread, functions) in enumerate(PATH):
        x = MARGIN + number * (lane + gap)
        if thread.startswith("maskwire-") and thread not in dict(started):
            raise SystemExit(f"docs/architecture.py: no module starts the thread {thread!r}; correct PATH")
        drawing.box(x, y, lane, 216, "#f8fafc")
        drawing.text(x + lane / 2, y + 22, thread, style=BOLD, middle=True)
        for place, (module, function, words) in enumerate(functions):
            if function not in names(SERVER / module):
                raise SystemExit(f"docs/architecture.py: {module} has no {function}; correct PATH")
            inner = y + 36 + place * 59
            drawing.box(x + 10, inner, lane - 20, 50, "#ffffff")
            drawing.text(x + 20, inner + 20, function, size=12, style=MONO)
            drawing.text(x + 20, inner + 39, words, size=12, color=LINE)
        if number:
            middle = y + 100
            drawing.arrow(f"M{x - gap + 4} {middle} H{x - 4}")
            for line, words in enumerate(("queue", "commits")[number - 1 : number]):
                drawing.text(x - gap / 2, middle - 8 + 14 * line, words, size=12, middle=True)
    end = MARGIN + 2 * (lane + gap) + lane / 2
    drawing.arrow(f"M{end:g} {y + 216} V{y + 244} H{MARGIN + lane / 2:g} V{y + 220}")
    drawing.text(WIDTH / 2, y + 238, "answers: futures, once the step is durable", size=12, middle=True)
    main = {thread for thread, _ in PATH}
    others = [f"{name} ({module})" for name, module in started if name not in main]
    y += 272
    drawing.text(MARGIN, y, "Other threads:", size=12, style=BOLD)
    drawing.text(MARGIN + 118, y, ", ".join(others[: len(others) // 2]) + ",", size=12)
    drawing.text(MARGIN + 118, y + 18, ", ".join(others[len(others) // 2 :]), size=12)
    return y + 30


def draw_packages(
    drawing: Drawing, top: float, places: dict[str, Point], arrows: Iterable[tuple[str, str]]
) -> float:
    """Boxes at their places and arrows between them; packages that have no place come below the others."""
    arrows = {(one, other) for one, other in arrows if one != other}
    homeless = sorted({part for arrow in arrows for part in arrow} - set(places))
    low = max(y for _, y in places.values())
    at = {**places, **{part: (160 * number, low + 90) for number, part in enumerate(homeless)}}
    for one, other in sorted(arrows):
        if (other, one) not in arrows or one < other:
            drawing.arrow(_line(at[one], at[other], at.values(), top), both=(other, one) in arrows)
    for part, (x, y) in at.items():
        fill = FILLS.get(part, FILLS["run"] if part in RUN else "#eef2ff")
        drawing.box(MARGIN + x, top + y, BOX_W, BOX_H, fill)
        drawing.text(MARGIN + x + BOX_W / 2, top + y + 27, part, size=14, style=BOLD, middle=True)
    return top + max(y for _, y in at.values()) + BOX_H


def _line(one: Point, other: Point, boxes: Iterable[Point], top: float) -> str:
    """A line from the edge of one box to the edge of the other; over the top where a third box is in its way."""
    (x1, y1), (x2, y2) = ((MARGIN + x + BOX_W / 2, top + y + BOX_H / 2) for x, y in (one, other))
    in_between = [box for box in boxes if box not in (one, other) and _is_between(box, one, other)]
    if in_between:
        side = 1 if x2 > x1 else -1
        start, end, up, down = x1 + 25 * side, x2 - 25 * side, y1 - BOX_H / 2, y2 - BOX_H / 2
        peak = min(up, down) - 52
        return f"M{start:g} {up:g} C{start + 40 * side:g} {peak:g} {end - 40 * side:g} {peak:g} {end:g} {down - 3:g}"
    return "M{:g} {:g} L{:g} {:g}".format(*_edge(x1, y1, x2, y2, 2), *_edge(x2, y2, x1, y1, 4))


def _is_between(box: Point, one: Point, other: Point) -> bool:
    """Whether the line between the middles of two boxes meets a third box."""
    for number in range(1, 50):
        x, y = (a + (b - a) * number / 50 for a, b in zip(one, other, strict=True))
        if abs(x - box[0]) < BOX_W / 2 and abs(y - box[1]) < BOX_H / 2:
            return True
    return False


def _edge(x: float, y: float, to_x: float, to_y: float, apart: float) -> tuple[float, float]:
    """Where the line from the middle of a box to another point leaves the box."""
    dx, dy = to_x - x, to_y - y
    share = min(
        (BOX_W / 2 + apart) / abs(dx) if dx else 9.0,
        (BOX_H / 2 + apart) / abs(dy) if dy else 9.0,
    )
    return round(x + dx * share, 1), round(y + dy * share, 1)


def draw_shared(drawing: Drawing, y: float, title: str, parts: Iterable[str]) -> float:
    """The modules that every package may import."""
    drawing.box(MARGIN, y, WIDTH - 2 * MARGIN, 52, FILLS["values"])
    drawing.text(MARGIN + 14, y + 21, title, size=12, color=LINE)
    drawing.text(MARGIN + 14, y + 40, " · ".join(parts), style=BOLD)
    return y + 52


def picture() -> str:
    """docs/images/architecture.svg."""
    drawing = Drawing()
    y = draw_threads(drawing, 36) + 36
    drawing.text(MARGIN, y, "Packages of the server", size=17, style=BOLD)
    drawing.text(MARGIN + 240, y, "A → B: a module of A imports one of B", size=12, color=LINE)
    server = Packages.read(SERVER)
    users = server.packages - {"cli"}
    shared = server.shared(users)
    top = y + 20
    x, low = SERVER_PLACES["engine"]
    drawing.box(MARGIN + x - 15, top + low - 27, 435, 197, "#ffffff", dashed=True)
    drawing.text(MARGIN + x - 5, top + low - 10, "one run", size=12, color=LINE)
    arrows = {
        (_joined(one, server), _joined(other, server))
        for one, other in server.arrows
        if one not in shared and other not in shared
    }
    y = draw_packages(drawing, top, SERVER_PLACES, arrows) + 38
    joining = [part for part in server.parts if part not in server.packages and part not in shared]
    words = f"app: the modules {', '.join(joining)}, which join packages."
    drawing.text(
        MARGIN, y, f"{words} rpc, the run and training never import one another.", size=12, color=LINE
    )
    y = (
        draw_shared(
            drawing, y + 14, "imported everywhere (values; neither gRPC nor SQLite nor torch):", shared
        )
        + 44
    )

    drawing.text(MARGIN, y, "Packages of the client", size=17, style=BOLD)
    drawing.text(
        MARGIN + 240, y, "v1 (stubs and digest) is all that the server imports of it", size=12, color=LINE
    )
    client = Packages.read(CLIENT)
    shown = client.packages | set(CLIENTS)
    arrows = {
        ("client, aio" if one in CLIENTS else one, "client, aio" if other in CLIENTS else other)
        for one, other in client.arrows
        if one in shown and other in shown
    }
    y = draw_packages(drawing, y + 40, CLIENT_PLACES, arrows) + 20
    beside = [part for part in client.parts if part not in shown]
    y = draw_shared(drawing, y, "modules beside the packages:", beside)
    return drawing.svg(y + MARGIN)


def _joined(part: str, server: Packages) -> str:
    """Modules that join packages are drawn as one."""
    return part if part in server.packages else "app"
