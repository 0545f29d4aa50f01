"""The canvas in the terminal as it fills: final tokens coloured by the step they came in, provisional ones dim."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from hasten.errors import IncompatibleError

if TYPE_CHECKING:
    from rich.text import Text

    from hasten.llm import LLM
    from hasten.types import Event

_MASK = "░"
_HUES = ("bright_yellow", "yellow", "bright_green", "green", "cyan", "bright_blue", "blue", "magenta")


class CanvasView:
    """What is known of every place of a canvas, from the trace: `update` takes events, `text` draws them.

    Colours go from yellow (committed in the first forward) to magenta (in the last); places the model has only guessed at
    are dim, and masked ones are blocks.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._final: dict[int, tuple[int, int]] = {}  # place -> (token, forward)
        self._guesses: dict[int, int] = {}
        self._end = 0
        self._start = 1 << 60
        self.forwards = 0

    def update(self, event: Event) -> None:
        """Take over what an event says."""
        if event.kind == "forward":
            self.forwards += 1
            self._guesses.clear()
        elif event.kind == "block":
            self._start, self._end = min(self._start, event.position), max(self._end, event.total)
        elif event.kind == "propose":
            self._guesses[event.position] = event.token
        elif event.kind == "commit" and event.token >= 0:
            self._final[event.position] = (event.token, self.forwards)
        elif event.kind == "commit":
            self._final.pop(event.position, None)

    def text(self) -> Text:
        """The canvas so far."""
        from rich.text import Text

        out, ends = Text(), self._llm.model.capabilities.eos_ids
        for place in range(self._start, self._end):
            if place in self._final:
                token, forward = self._final[place]
                hue = _HUES[min(forward - 1, self.forwards - 1) * len(_HUES) // max(1, self.forwards)]
                out.append("⏹" if token in ends else self._llm.decode([token]), hue)
            elif place in self._guesses:
                out.append("⏹" if self._guesses[place] in ends else self._llm.decode([self._guesses[place]]), "dim italic")
            else:
                out.append(_MASK, "dim")
        done = len(self._final)
        out.append(f"\n{done} tokens in {self.forwards} forwards", "dim")
        return out


def watch_canvas(llm: LLM, events: Iterable[Event]) -> Iterator[Event]:
    """The same events; the canvas they fill is drawn in place, and the text printed at the end.

    Raises IncompatibleError for models that write from left to right.
    """
    from rich.console import Console
    from rich.live import Live

    if llm.model.capabilities.kind != "masked":
        raise IncompatibleError("--watch shows a canvas; this model writes from left to right", field="watch")
    view, console = CanvasView(llm), Console()
    llm.engine.canvas_loop.provisional = True
    try:
        with Live(console=console, refresh_per_second=20, transient=False) as live:
            for event in events:
                view.update(event)
                if event.kind in ("forward", "stop"):
                    live.update(view.text(), refresh=True)
                yield event
                if event.output is not None:
                    live.stop()
                    console.print(event.output.text, markup=False, highlight=False)
    finally:
        llm.engine.canvas_loop.provisional = False
