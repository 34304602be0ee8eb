"""A page on which one sees what an embedder finds and what a reranker makes of it.

    python examples/playground.py
    python examples/playground.py --embedder BAAI/bge-m3

Without arguments the stand-in searches, and no model hub is needed. The page is served to this
machine alone; it loads nothing from elsewhere, and sends nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import warnings
from dataclasses import replace

import playground_search
import stand_in
from hosts import HOSTS
from nicegui import app, events, ui
from playground_search import CORPORA, ENCYCLOPAEDIA, FILES, PYTHON, Refusal, Switches, Workbench
from playground_view import STYLE, answer_html

QUESTIONS = {
    ENCYCLOPAEDIA: "when was coffee first made into a drink",
    PYTHON: "How do I run cleanup code even when my function raises?",
    FILES: "",
}
LARGEST = 20_000_000  # bytes of a file
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><g fill="#2a9d6f">'
    '<rect x="1" y="2" width="14" height="3"/><rect x="1" y="7" width="9" height="3"/>'
    '<rect x="1" y="12" width="5" height="3"/></g></svg>'
)


class Page:
    """One browser's page.

    Args:
        bench: What answers.
    """

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._switches = Switches()
        self._corpus = ENCYCLOPAEDIA
        self._asked = ""
        self._partial = False
        self._latest = 0  # the newest question's number: older answers come too late
        self._known = False
        ui.add_css(STYLE)
        self._dark = ui.dark_mode(value=None)
        with ui.column().classes("w-full max-w-screen-xl mx-auto gap-3 p-2"):
            self._head()
            self._controls()
            self._notice = ui.label().classes("notice w-full rounded p-2").mark("notice")
            self._notice.style("background: #fdecea; color: #7a271a").set_visibility(False)
            self._shown = ui.html("", sanitize=False).classes("w-full")  # it escapes what it shows
        ui.timer(0.4, self._tick)

    def _head(self) -> None:
        with ui.row().classes("w-full items-baseline gap-4"):
            ui.label("bge-adapters playground").classes("text-xl font-semibold")
            self._status = ui.label("Loading the models …").classes("status text-sm opacity-70")
            ui.space()
            ui.button(icon="contrast", on_click=self._flip_dark).props(
                "flat round dense aria-label='light or dark'"
            )

    def _controls(self) -> None:
        with ui.row().classes("w-full items-center gap-4"):
            ui.toggle(CORPORA, value=self._corpus, on_change=self._take_corpus).props(
                "no-caps padding='5px 14px'"
            ).classes("corpus")
            ui.space()
            ui.toggle(
                {key: host.name for key, host in HOSTS.items()},
                value=self._switches.host,
                on_change=lambda event: self._switch(host=event.value),
            ).props("no-caps padding='5px 14px'").classes("host")
        self._upload = (
            ui.upload(
                multiple=True,
                auto_upload=True,
                max_file_size=LARGEST,
                on_multi_upload=self._take_files,
                on_rejected=lambda: self._say(
                    f"A file was not taken: it has more than {LARGEST // 1_000_000} MB."
                ),
                label="Drop .txt, .md, .rst, .html or .pdf files here",
            )
            .props("flat bordered")
            .classes("w-full")
        )
        self._upload.set_visibility(False)
        self._files = ui.label().classes("files text-xs opacity-70")
        self._files.set_visibility(False)
        with ui.row().classes("w-full items-center gap-3 no-wrap"):
            self._question = (
                ui.input("Your question", value=QUESTIONS[self._corpus])
                .props("outlined dense")
                .classes("question grow")
                .on("keydown.enter", self._ask)
            )
            self._button = ui.button("Ask", on_click=self._ask).classes("ask").props("no-caps")
        with ui.row().classes("w-full items-center gap-6"):
            self._instruction = ui.switch(
                "Instruction", on_change=lambda event: self._switch(instruction=event.value)
            ).classes("instruction")
            ui.switch(
                "Reranker", value=True, on_change=lambda event: self._switch(reranker=event.value)
            ).classes("reranker")
            self._hybrid = ui.switch(
                "Hybrid search", on_change=lambda event: self._switch(hybrid=event.value)
            ).classes("hybrid")
            self._hybrid.disable()
            self._notes = ui.label().classes(
                "notes text-xs opacity-70 flex-1 min-w-64 whitespace-pre-line"
            )

    def _flip_dark(self) -> None:
        self._dark.set_value(not self._dark.value)

    async def _take_corpus(self, event: events.ValueChangeEventArguments[str]) -> None:
        self._corpus, self._asked, self._shown.content = event.value, "", ""
        self._latest += 1
        self._show_files()
        self._question.set_value(QUESTIONS[self._corpus])
        self._say("")
        if self._corpus != FILES or self._bench.files:
            self._bench.prepare(self._corpus, self._switches.host)

    async def _take_files(self, event: events.MultiUploadEventArguments) -> None:
        files = [(file.name, await file.read()) for file in event.files]
        refused = await asyncio.to_thread(self._bench.drop, files)
        self._upload.reset()
        self._show_files()
        self._say(" ".join(refused))
        if len(refused) < len(files):
            self._bench.prepare(FILES, self._switches.host)
            if self._asked:
                await self._answer()

    def _show_files(self) -> None:
        self._upload.set_visibility(self._corpus == FILES)
        self._files.text = ", ".join(self._bench.files)
        self._files.set_visibility(self._corpus == FILES and bool(self._bench.files))

    async def _switch(self, **changed: bool | str) -> None:
        self._switches = replace(self._switches, **changed)  # type: ignore[arg-type]
        if self._asked:
            await self._answer()
        else:
            self._bench.prepare(self._corpus, self._switches.host)

    async def _ask(self) -> None:
        self._asked = self._question.value or ""
        await self._answer()

    async def _answer(self) -> None:
        self._latest += 1
        mine = self._latest
        self._button.props("loading")
        try:
            answer = await asyncio.wrap_future(
                self._bench.ask(self._asked, self._corpus, self._switches)
            )
        except Refusal as exc:
            if mine == self._latest:
                self._say(str(exc))
                self._shown.content, self._asked = "", ""
        else:
            if mine == self._latest:
                self._say("")
                self._shown.content = answer_html(answer)
                self._partial = answer.indexed < answer.total
        finally:
            if mine == self._latest:
                self._button.props(remove="loading")

    async def _tick(self) -> None:
        """Say how far the index is, and ask again once it is whole."""
        if self._bench.failure:
            self._status.text = ""
            self._say(self._bench.failure)
            return
        models = self._bench.models
        if models and not self._known:
            self._known = True
            self._instruction.set_value(models.instructed)
            self._instruction.set_enabled(bool(models.instruction))
            self._hybrid.set_enabled(not models.no_hybrid)
            self._notes.text = f"{models.instruction_note}\n{models.no_hybrid}"
        done, total = self._bench.progress(self._corpus, self._switches.host)
        if not total:
            empty = self._corpus == FILES and not self._bench.files
            self._status.text = "No files yet." if empty else "Loading …"
        elif done < total:
            self._status.text = f"{done:,} of {total:,} passages are indexed"
        else:
            self._status.text = f"{total:,} passages, ready"
            if self._partial and self._asked:
                self._partial = False
                await self._answer()

    def _say(self, sentence: str) -> None:
        self._notice.text = sentence
        self._notice.set_visibility(bool(sentence))


def main() -> None:
    """Serve the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--embedder", help="a hub id or folder (default: the PyPI stand-in)")
    parser.add_argument("--reranker", help="a hub id or folder (default: the stand-in's)")
    parser.add_argument("--port", type=int, default=8300)
    parser.add_argument("--no-browser", action="store_true", help="open no browser")
    options = parser.parse_args()
    logging.getLogger("bge_core").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Payload indexes have no effect in the local Qdrant")
    bench = Workbench(
        lambda: playground_search.choose_models(options.embedder, options.reranker),
        folder=stand_in.cache_folder() / "playground",
    )
    # The models load while the browser opens.
    app.on_startup(bench.prepare)
    app.on_shutdown(bench.close)

    def page() -> None:
        Page(bench)

    ui.run(
        page,
        host="127.0.0.1",  # this machine alone
        port=options.port,
        title="bge-adapters playground",
        favicon=ICON,
        show=not options.no_browser,
        reload=False,
    )


if __name__ == "__main__":
    main()
