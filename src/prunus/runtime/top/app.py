"""The screen of ``prunus top`` and its keys.

Two tasks keep it going: one listens to what the broker tells, and one looks (`source`), after a change at most every
`LOOK_INTERVAL_S`, and at least every `REFRESH_S`. What a person does is answered at once from what is known, and looked
at anew `HAND_INTERVAL_S` later. A broker that is away leaves the last picture on the screen and is asked until it
answers again. Pauses, kills and the like run beside all that; nothing waits for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Horizontal, VerticalScroll
from textual.geometry import Size
from textual.message import Message
from textual.screen import ModalScreen
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.theme import Theme
from textual.widgets import Input, Static

from prunus.errors import CheckpointNotFoundError, MessagingError, PrunusError
from prunus.persistence.persister import Record
from prunus.runtime.controller import ProcessController, ProcessHandle
from prunus.runtime.display import class_name, plain, short
from prunus.runtime.top.model import (
    PALETTE,
    Columns,
    Filter,
    Look,
    Rates,
    Row,
    View,
    arrange,
    details_text,
    fitted,
    headline,
    next_sort,
    process_counts,
    process_heading,
    process_line,
    queue_lines,
    service_lines,
    services_width,
)
from prunus.runtime.top.source import Source

if TYPE_CHECKING:
    from prunus.runtime.profile import Profile

LOOK_INTERVAL_S = 0.5
"""The broker is asked at most so often, whatever happens ..."""
REFRESH_S = 2.0
"""... and at least so often, so that a lost message does no harm."""
HAND_INTERVAL_S = 0.1
"""How soon what a person does is looked at: many keys in a row are one look."""
RETRY_S = 0.5
"""The pause before a broker that did not answer is asked again."""
NOTICE_S = 8.0
"""How long a message stays."""
PAGE = 100
"""So many rows are read to begin with, and so many more when the last of them are near."""
MAX_ROWS = 1000
WIDE = 140
"""From so many columns on details are beside the processes, else below them."""
TALL = 32
"""With fewer rows the details take the place of services and queues, ..."""
TINY = 16
"""... and with fewer than these there is no place for them at all."""
NARROW = 64
"""With fewer columns services are left out."""

KEYS = (
    ("p", "pause"),
    ("P", "play"),
    ("k", "kill"),
    ("r", "retry"),
    ("⏎", "details"),
    ("t", "tree"),
    ("s", "sort"),
    ("/", "filter"),
    ("?", "help"),
    ("q", "quit"),
)
HELP = """\
↑ ↓ PgUp PgDn Home End   select a process
⏎    details of the selected process, or no details
p    pause it: it stops between two steps
P    play it: it goes on
k    kill it and its children, after a question
r    retry it, if it has failed or was set aside
/    filter: all words must hold
     state:paused  class:Eos  tag:demo  queue:gpu  worker:1
s    another order: newest, last change, state, class, progress
t    children below their parents, or all in one list
a    also processes that ended long ago
Tab  to the details and back; the arrow keys scroll there
Esc  no filter, no details
q    quit"""


class TopApp(App[None]):
    """``prunus top``. `place` is what the first line calls the daemon."""

    ENABLE_COMMAND_PALETTE = False
    TITLE = "prunus top"
    CSS = """
    Screen { background: $background; color: $foreground; }
    #head { height: 1; background: $panel; }
    #overview { height: auto; max-height: 12; }
    .panel { border: round #3a3341; border-title-color: $primary; border-subtitle-color: $muted;
             padding: 0 1; height: 100%; scrollbar-background: $background; scrollbar-color: #463f50;
             scrollbar-background-hover: $background; scrollbar-color-hover: #5d5469; }
    #overview .panel { height: auto; }
    #services { width: 2fr; }
    #queues { width: 3fr; }
    #body { height: 1fr; layout: vertical; }
    #processes { height: 1fr; }
    #processes:focus { border: round #6a5467; }
    #details { display: none; height: 1fr; scrollbar-size-vertical: 1; }
    #details:focus { border: round #6a5467; }
    .-detailed #details { display: block; }
    .-beside #body { layout: horizontal; }
    .-beside #processes { width: 3fr; height: 100%; }
    .-beside #details { width: 2fr; height: 100%; }
    .-low.-detailed #overview, .-tiny #overview { display: none; }
    #filter { display: none; height: 1; border: none; padding: 0 1; background: $panel; }
    .-filtering #filter { display: block; }
    .-filtering #keys { display: none; }
    #keys { height: 1; background: $panel; }
    ProcessTable { scrollbar-size-vertical: 1; overflow-x: hidden; }
    ProcessTable > .process-table--cursor { background: #2d2632; }
    ProcessTable:focus > .process-table--cursor { background: #433648; }
    Question, Help { align: center middle; background: $background 60%; }
    #box { width: auto; max-width: 90%; height: auto; max-height: 90%; padding: 1 3; background: $panel;
           border: round $primary; border-title-color: $primary; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "quit"),
        Binding("ctrl+c", "quit", show=False, priority=True),
        Binding("p", "tell('pause')", "pause"),
        Binding("P", "tell('play')", "play"),
        Binding("k", "kill", "kill"),
        Binding("r", "tell('retry')", "retry"),
        Binding("enter", "details", "details"),
        Binding("t", "tree", "tree"),
        Binding("s", "sort", "sort"),
        Binding("a", "everything", "all"),
        Binding("slash", "filter", "filter"),
        Binding("question_mark", "help", "help"),
        Binding("escape", "leave", "leave"),
    ]

    def __init__(
        self,
        controller: ProcessController,
        profile: Profile | None = None,
        *,
        place: str = "",
        utf8: bool = True,
        source: Source | None = None,
    ) -> None:
        """Over a network there is no `profile`. Without `utf8` there are only letters that every terminal has."""
        super().__init__()
        self.register_theme(_THEME)
        self.theme = _THEME.name
        self._controller = controller
        self._place = place
        self._utf8 = utf8
        self._source = source or Source(controller, profile)
        self._changed = asyncio.Event()
        self._by_hand = asyncio.Event()
        self._rates = Rates()
        self._notice = Text()
        self._notice_end_s = 0.0
        self.view = View(wanted=PAGE)
        self.last_look: Look | None = None
        self.trouble: str | None = "connecting ..."

    def compose(self) -> ComposeResult:
        yield Static(id="head")
        with Horizontal(id="overview"):
            services, queues = Static(id="services", classes="panel"), Static(id="queues", classes="panel")
            services.border_title, queues.border_title = "services", "queues"
            yield services
            yield queues
        with Container(id="body"):
            table = ProcessTable(self._utf8, id="processes", classes="panel")
            table.border_title = "processes"
            yield table
            with VerticalScroll(id="details", classes="panel") as details:
                details.border_title = "details"
                yield Static(id="detail-text")
        yield Input(id="filter", placeholder="words, state:paused, class:Eos, tag:demo", compact=True)
        yield Static(id="keys")

    def on_mount(self) -> None:
        self.query_one(ProcessTable).focus()
        self._draw()
        self.run_worker(self._look_on(), name="look", exit_on_error=True)
        self.run_worker(self._listen(), name="listen", exit_on_error=True)

    # --- looking ------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        while True:
            with contextlib.suppress(MessagingError):  # it is away; the other task says so
                async with self._controller.events() as stream:
                    async for _ in stream:
                        self._changed.set()
            await asyncio.sleep(RETRY_S)

    async def _look_on(self) -> None:
        while True:
            self._changed.clear()
            self._by_hand.clear()
            begun_s = time.monotonic()
            try:
                look = await self._source.look(self.view)
            except (TimeoutError, MessagingError):
                self.trouble = "reconnecting ..."
                self._draw()
                await asyncio.sleep(RETRY_S)
                continue
            except CheckpointNotFoundError:  # the process of the details was deleted
                self.view = dataclasses.replace(self.view, details_of=None)
                continue
            except PrunusError as error:
                self.trouble = str(error)
                self._draw()
                await asyncio.sleep(REFRESH_S)
                continue
            self.trouble = None
            self.last_look = look
            self._rates.observe(time.monotonic(), {name: queue.settled for name, queue in look.status.queues.items()})
            self._draw()
            await self._until_next(begun_s)

    async def _until_next(self, begun_s: float) -> None:
        """Wait for a change or for `REFRESH_S`, but at least the interval that holds."""
        hand = asyncio.ensure_future(self._by_hand.wait())
        change = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait([hand, change], timeout=REFRESH_S, return_when=asyncio.FIRST_COMPLETED)
            took_s = time.monotonic() - begun_s
            if hand.done():
                await asyncio.sleep(HAND_INTERVAL_S)
            elif took_s < LOOK_INTERVAL_S:
                await asyncio.wait([hand], timeout=LOOK_INTERVAL_S - took_s)
        finally:
            hand.cancel()
            change.cancel()

    def _wish(self, **changes: object) -> None:
        """Another view: shown from what is known, then looked at."""
        self.view = dataclasses.replace(self.view, **changes)  # type: ignore[arg-type]
        self._by_hand.set()
        self._draw()

    # --- drawing ------------------------------------------------------------------------------------

    def _draw(self) -> None:
        if not self.is_running or len(self.screen_stack) == 0:
            return
        main = self.screen_stack[0]
        width, height = self.size
        is_detailed = self.view.details_of is not None
        main.set_class(is_detailed, "-detailed")
        main.set_class(width >= WIDE, "-beside")
        main.set_class(height < TALL, "-low")
        main.set_class(height < TINY, "-tiny")
        look = self.last_look
        main.query_one("#head", Static).update(headline(look, self._place, self.trouble, width))
        main.query_one("#keys", Static).update(self._keys(width))
        if look is None:
            return
        self._draw_overview(look, width, height)
        rows = [row for row in look.records if self.view.filter.holds(row)]
        table = main.query_one(ProcessTable)
        live_first = not self.view.everything
        arranged = arrange(rows, self.view.sort, tree=self.view.tree, live_first=live_first, utf8=self._utf8)
        table.show(arranged, look.at)
        words = " ".join(self.view.filter.words)
        how = [f"filter: {words}" if words else "", "" if self.view.sort == "newest" else f"by {self.view.sort}"]
        how += ["" if self.view.tree else "flat", "all" if self.view.everything else ""]
        table.border_title = plain("  ·  ".join(["processes", *filter(None, how)])).replace("[", r"\[")
        table.border_subtitle = process_counts(look, len(rows))
        if is_detailed and look.details is not None and look.details.record.pid == self.view.details_of:
            text = details_text(look.details, look.at, utf8=self._utf8)
            main.query_one("#detail-text", Static).update(text)

    def _draw_overview(self, look: Look, width: int, height: int) -> None:
        main = self.screen_stack[0]
        services, queues = main.query_one("#services", Static), main.query_one("#queues", Static)
        services.display = has_services = bool(look.services) and width >= NARROW
        room = max(3, min(9, height // 4 - 1))
        lines = max(2, min(room, max(len(look.services), len(look.status.queues)) + 1))
        left = services_width(look.services, width) - 4
        right = width - 4 - (left + 4 if has_services else 0)
        services.styles.width = left + 4
        queues.styles.width = right + 4
        for panel, found in (
            (services, service_lines(look.services, left, lines, utf8=self._utf8)),
            (queues, queue_lines(look.status, self._rates, right, lines, utf8=self._utf8)),
        ):
            found += [Text()] * (lines - len(found))
            panel.update(Text("\n").join(found))

    def _keys(self, width: int) -> Text:
        if self._notice and time.monotonic() < self._notice_end_s:
            return fitted(Text.assemble(" ", self._notice), width)
        keys = [(key if self._utf8 or key != "⏎" else "Enter", name) for key, name in KEYS]
        gap = "  " if sum(len(key) + len(name) + 3 for key, name in keys) < width else " "
        text = Text(" ")
        for key, name in keys:
            text.append(key, f"bold {PALETTE['plum']}")
            text.append(f" {name}{gap}", PALETTE["dim"])
        return fitted(text, width)

    def say(self, text: str, style: str = "text") -> None:
        """A message in the last line, for a while."""
        self._notice = Text(plain(" ".join(text.split())), PALETTE[style])
        self._notice_end_s = time.monotonic() + NOTICE_S
        self.set_timer(NOTICE_S + 0.05, self._draw)
        self._draw()

    def on_resize(self) -> None:
        self._draw()

    # --- what a person does -------------------------------------------------------------------------

    @property
    def selected(self) -> Record | None:
        """The process under the cursor."""
        return self.screen_stack[0].query_one(ProcessTable).selected

    def on_process_table_moved(self, message: ProcessTable.Moved) -> None:
        if self.view.details_of is not None and message.pid != self.view.details_of:
            self.query_one("#details", VerticalScroll).scroll_home(animate=False)
            self._wish(details_of=message.pid)
        if message.left < PAGE // 2 and self.view.wanted < MAX_ROWS and self.last_look and self.last_look.is_cut:
            self._wish(wanted=self.view.wanted + PAGE)

    def action_details(self) -> None:
        selected = self.selected
        self.screen_stack[0].query_one(ProcessTable).hold()
        self._wish(details_of=selected.pid if selected and self.view.details_of is None else None)

    def action_tree(self) -> None:
        self._wish(tree=not self.view.tree)

    def action_sort(self) -> None:
        self._wish(sort=next_sort(self.view.sort))

    def action_everything(self) -> None:
        self._wish(everything=not self.view.everything)

    def action_filter(self) -> None:
        self.screen.set_class(True, "-filtering")
        self.query_one(Input).focus()

    def action_leave(self) -> None:
        if self.screen.has_class("-filtering") or self.view.filter.words:
            self.query_one(Input).value = ""
            self._end_filtering()
            self._wish(filter=Filter(), wanted=PAGE)
        else:
            self._wish(details_of=None)

    def on_input_changed(self, message: Input.Changed) -> None:
        self._wish(filter=Filter.read(message.value), wanted=PAGE)

    def on_input_submitted(self) -> None:
        self._end_filtering()

    def _end_filtering(self) -> None:
        self.screen.set_class(False, "-filtering")
        self.query_one(ProcessTable).focus()

    def action_help(self) -> None:
        self.push_screen(Help(HELP))

    def action_kill(self) -> None:
        record = self.selected
        if record is None or record.is_terminal:
            self.say("a process that has ended can't be killed" if record else "no process is selected", "warning")
            return
        question = f"Kill {class_name(record.class_id)} {short(record.pid)} and its children, for good?"

        def answered(yes: bool | None) -> None:
            if yes:
                self._tell("kill", record)

        self.push_screen(Question(plain(question)), answered)

    def action_tell(self, what: str) -> None:
        record = self.selected
        if record is None:
            self.say("no process is selected", "warning")
            return
        self._tell(what, record)

    def _tell(self, what: str, record: Record) -> None:
        doing, done, act = _ACTIONS[what]
        name = f"{class_name(record.class_id)} {short(record.pid)}"

        async def tell() -> None:
            self.say(f"{doing} {name} ...", "dim")
            try:
                await act(self._controller.handle(record.pid))
            except (PrunusError, TimeoutError) as error:
                self.say(f"{name}: {error or 'the broker does not answer'}", "bad")
            else:
                self.say(f"{done} {name}", "good")
            self._by_hand.set()

        self.run_worker(tell(), name=what, group="tell", exit_on_error=False)


_ACTIONS: dict[str, tuple[str, str, Callable[[ProcessHandle], Awaitable[None]]]] = {
    "pause": ("pausing, when its step ends:", "paused", lambda handle: handle.pause()),
    "play": ("playing", "playing", lambda handle: handle.play()),
    "kill": ("killing", "killed", lambda handle: handle.kill()),
    "retry": ("continuing", "continued", lambda handle: handle.retry()),
}


class ProcessTable(ScrollView, can_focus=True):
    """The processes, with a heading and a cursor. Only lines that are on the screen are made."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"process-table--cursor"}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "move(-1)", show=False),
        Binding("down,j", "move(1)", show=False),
        Binding("pageup", "page(-1)", show=False),
        Binding("pagedown", "page(1)", show=False),
        Binding("home,g", "move(-1000000)", show=False),
        Binding("end,G", "move(1000000)", show=False),
    ]

    class Moved(Message):
        """The cursor is at another process, with so many rows `left` below it."""

        def __init__(self, pid: str | None, left: int) -> None:
            super().__init__()
            self.pid = pid
            self.left = left

    def __init__(self, utf8: bool, *, id: str, classes: str) -> None:
        super().__init__(id=id, classes=classes)
        self._utf8 = utf8
        self.rows: list[Row] = []
        self._now = 0.0
        self._columns = Columns.fit(80, ())
        self._cursor = 0
        self._stays_on_top = True

    @property
    def selected(self) -> Record | None:
        return self.rows[self._cursor].record if self.rows else None

    def hold(self) -> None:
        """The cursor stays with its process from now on, also if that is at the top."""
        self._stays_on_top = False

    def show(self, rows: list[Row], now: float) -> None:
        """Other rows. The cursor stays with its process; at the top it stays at the top until it was moved."""
        before, place = self.selected, self._cursor
        self.rows, self._now = rows, now
        pids = {row.record.pid: number for number, row in enumerate(rows)}
        if self._stays_on_top:
            self._cursor = 0
        elif before is not None and before.pid in pids:
            self._cursor = pids[before.pid]
        self._cursor = max(0, min(self._cursor, len(rows) - 1))
        self._columns = Columns.fit(self.scrollable_content_region.width, rows)
        self.virtual_size = Size(self.scrollable_content_region.width, len(rows) + 1)
        if self._cursor != place:  # what is above it grew or shrank: the eye finds it where it was
            self.scroll_to(y=max(0, self.scroll_target_y + self._cursor - place), animate=False)
            self._bring_into_view()
        after = self.selected
        if (after and after.pid) != (before and before.pid):
            self._tell_moved()
        self.refresh()

    def render_line(self, y: int) -> Strip:
        width = self.scrollable_content_region.width
        style = self.rich_style
        if y == 0:
            text = process_heading(self._columns)
        else:
            number = y - 1 + self.scroll_offset.y
            if number >= len(self.rows):
                return Strip.blank(width, style)
            text = process_line(self.rows[number], self._columns, self._now, utf8=self._utf8)
            if number == self._cursor:
                style += self.get_component_rich_style("process-table--cursor")
        segments = text.render(self.app.console, end="")
        return Strip(segments).crop_extend(0, width, None).apply_style(style)

    def on_resize(self, event: events.Resize) -> None:
        self.show(self.rows, self._now)
        self.call_after_refresh(self._bring_into_view)

    def on_click(self, event: events.Click) -> None:
        number = event.get_content_offset_capture(self).y - 1 + self.scroll_offset.y
        if 0 <= number < len(self.rows):
            self.action_move(number - self._cursor)

    def action_page(self, direction: int) -> None:
        self.action_move(direction * max(1, self.scrollable_content_region.height - 2))

    def action_move(self, by: int) -> None:
        if not self.rows:
            return
        self._cursor = max(0, min(len(self.rows) - 1, self._cursor + by))
        self._stays_on_top = self._cursor == 0
        self._bring_into_view()
        self._tell_moved()
        self.refresh()

    def _bring_into_view(self) -> None:
        height = self.scrollable_content_region.height - 1
        top = min(self._cursor, max(self.scroll_target_y, self._cursor - height + 1))
        if top != self.scroll_target_y:
            self.scroll_to(y=top, animate=False)

    def _tell_moved(self) -> None:
        selected = self.selected
        self.post_message(self.Moved(selected.pid if selected else None, len(self.rows) - self._cursor))


class Question(ModalScreen[bool]):
    """Yes or no."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "dismiss(True)"),
        Binding("n,escape,q", "dismiss(False)"),
    ]

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def compose(self) -> ComposeResult:
        keys = Text.assemble(
            ("y", f"bold {PALETTE['bad']}"), (" yes     ", ""), ("n", f"bold {PALETTE['plum']}"), (" no", "")
        )
        yield Static(Text.assemble(self._text, "\n\n", keys), id="box")


class Help(ModalScreen[None]):
    """What the keys do."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,question_mark,enter", "dismiss(None)")]

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def compose(self) -> ComposeResult:
        box = Static(Text(self._text), id="box")
        box.border_title = "keys"
        yield box


_THEME = Theme(
    name="prunus",
    primary=PALETTE["plum"],
    secondary=PALETTE["waiting"],
    accent=PALETTE["warning"],
    foreground=PALETTE["text"],
    background="#1b181f",
    surface="#221e27",
    panel="#2a2530",
    success=PALETTE["good"],
    warning=PALETTE["warning"],
    error=PALETTE["bad"],
    dark=True,
    variables={"muted": PALETTE["dim"]},
)
