"""The page: what is on it, and what happens when something on it is used.

It shows conversations and holds none, nor a second engine: every tab is a ``Visitor``. What is
saved is made in the browser, so that no conversation is ever written to this machine's disk.
Gradio takes updates apart, so that each is made anew, even where several say the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from qlora_pl.chat.controls import WHO, Drawing, Who, names_of
from qlora_pl.chat.conversing import Chat
from qlora_pl.chat.markup import as_html, as_markdown
from qlora_pl.chat.visiting import Look, Visitor
from qlora_pl.chat.writing import Queue
from qlora_pl.data.conversation import Message
from qlora_pl.errors import QLoRAError
from qlora_pl.inference.loading import Model
from qlora_pl.inference.source import BASE
from qlora_pl.modeling.answers.decoding import DecodingConfig
from qlora_pl.modeling.answers.generation import context_of

logger = logging.getLogger(__name__)

CSS = Path(__file__).parent / "page.css"
MOST_NEW_TOKENS = 4096
"""Where the slider of answer length ends for models that read more."""
DOWNLOAD = """(text) => {
  if (!text) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/jsonl"}));
  link.download = "conversation.jsonl";
  link.click();
  URL.revokeObjectURL(link.href);
}"""
FAILED = "The answer failed; the terminal says why."
NOTHING_SAID = "Nothing has been said yet."


class Page:
    """The page for one model.

    Args:
        model: What answers.
        decoding: How answers are drawn, until a visitor chooses otherwise.
        system: A system message, until a visitor writes another.
        title: What is asked, in a few words.
    """

    def __init__(
        self, model: Model, decoding: DecodingConfig, system: str | None, title: str
    ) -> None:
        self.model = model
        self.decoding = decoding
        self.system = system
        self.title = title
        self.visitors: dict[str, Visitor] = {}
        self._queue = Queue()

    def blocks(self) -> gr.Blocks:
        """The page as Gradio knows it."""
        with gr.Blocks(title=self.title, analytics_enabled=False, fill_width=True) as blocks:
            gr.Markdown(f"# {as_markdown(self.title)}", elem_id="heading")
            with gr.Row():
                with gr.Column(scale=3, min_width=280, elem_id="talk"):
                    self._add_conversation()
                with gr.Column(scale=1, min_width=280, elem_id="controls"):
                    self._add_controls()
            self._connect()
            blocks.unload(self.leave)
        return blocks

    def end(self) -> None:
        """Stop every answer."""
        for visitor in list(self.visitors.values()):
            visitor.stop()

    # -- what is on it -----------------------------------------------------------------------------

    def _add_conversation(self) -> None:
        first, *_ = self._names(WHO[0], None, BASE)
        with gr.Row():
            self.sides = [
                gr.Chatbot(
                    label=self._label(first),
                    height="62vh",
                    min_width=280,
                    elem_id=f"side-{place}",
                    elem_classes=["side"],
                    visible=place == 0,
                    placeholder="Ask something.",
                    latex_delimiters=[],
                    buttons=[],
                    feedback_options=None,
                    allow_file_downloads=False,
                    layout="bubble",
                )
                for place in range(2)
            ]
        self.said = gr.HTML("", elem_id="said")
        self.question = gr.Textbox(
            placeholder="Your question",
            show_label=False,
            max_lines=8,
            autofocus=True,
            elem_id="question",
        )
        with gr.Row(elem_id="buttons"):
            self.send = gr.Button("Send", variant="primary", elem_id="send")
            self.stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")
            self.retry = gr.Button("Retry", elem_id="retry")
            self.clear = gr.Button("Clear", elem_id="clear")
            self.save = gr.Button("Save", elem_id="save")
        self.saved = gr.Textbox(elem_id="saved", container=False, show_label=False)

    def _add_controls(self) -> None:
        adapters, given = self.model.adapters, self.decoding
        self.who = gr.Radio(
            list(WHO),
            value=WHO[0],
            label="Adapter",
            info="Off: the base answers alone.",
            visible=bool(adapters),
            elem_id="who",
        )
        has_choice = len(adapters) > 1
        self.adapter = gr.Dropdown(
            adapters, value=adapters[0] if adapters else None, label="Which", visible=has_choice
        )
        self.beside = gr.Dropdown([BASE, *adapters], value=BASE, label="Beside", visible=has_choice)
        self.system_text = gr.Textbox(
            self.system or "",
            label="System message",
            lines=2,
            info="Counts from the next answer on.",
            elem_id="system",
        )
        self.do_sample = gr.Checkbox(
            given.do_sample, label="Sample", info="Off: the likeliest token each time."
        )
        is_on = {"interactive": given.do_sample}
        self.temperature = gr.Slider(
            0, 2, given.temperature, step=0.05, label="Temperature", **is_on
        )
        self.top_p = gr.Slider(0, 1, given.top_p, step=0.01, label="Top-p", **is_on)
        self.top_k = gr.Slider(0, 200, given.top_k, step=1, label="Top-k, 0: all", **is_on)
        self.penalty = gr.Slider(
            1, max(2.0, given.repetition_penalty), given.repetition_penalty, step=0.01,
            label="Repetition penalty",
        )  # fmt: skip
        most = min(context_of(self.model.model) or MOST_NEW_TOKENS, MOST_NEW_TOKENS)
        self.length = gr.Slider(
            1, max(most, given.max_new_tokens), given.max_new_tokens, step=1,
            label="Answer length",
        )  # fmt: skip

    # -- what happens ------------------------------------------------------------------------------

    def _connect(self) -> None:
        chosen = [self.who, self.adapter, self.beside]
        drawing = [self.do_sample, self.temperature, self.top_p, self.top_k, self.penalty]
        controls = [*chosen, self.system_text, *drawing, self.length]
        shown = [*self.sides, self.said, self.question, self.send, self.stop, *self._at_rest()]
        # The model's own queue says who is next, and lets a stop through.
        how: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None}
        quiet = how | {"show_progress": "hidden"}
        for event in (self.send.click, self.question.submit):
            event(self.ask, [self.question, *controls], shown, **quiet)
        self.retry.click(self.ask_again, controls, shown, **quiet)
        self.stop.click(self.stop_answer, None, None, queue=False, **quiet)
        for event in (self.clear.click, *(side.clear for side in self.sides)):
            event(self.forget, None, [*self.sides, self.said], **quiet)
        for choice in chosen:
            choice.input(self.choose, chosen, [*self.sides, self.said], **quiet)
        self.do_sample.input(
            lambda is_on: [gr.update(interactive=is_on) for _ in range(3)],
            self.do_sample,
            [self.temperature, self.top_p, self.top_k],
            **quiet,
        )
        self.save.click(self.lines_of, None, [self.saved, self.said], **quiet).then(
            None, self.saved, None, js=DOWNLOAD, **quiet
        )

    def ask(self, request: gr.Request, question: str, *controls: Any) -> Iterator[list[Any]]:
        """Ask, and show the answer as it comes."""
        if question.strip():
            yield from self._answers(
                lambda visitor, *how: visitor.ask(question, *how), question, controls, request
            )

    def ask_again(self, request: gr.Request, *controls: Any) -> Iterator[list[Any]]:
        """Have the last question answered once more."""
        yield from self._answers(Visitor.retry, "", controls, request)

    def stop_answer(self, request: gr.Request) -> None:
        """Leave the answer as it is."""
        self._visitor(request).stop()

    def forget(self, request: gr.Request) -> list[Any]:
        """Forget what was said."""
        self._visitor(request).clear()
        return [*(gr.update(value=[]) for _ in self.sides), ""]  # who answers stays as it is

    def choose(self, request: gr.Request, who: Who, adapter: str | None, beside: str) -> list[Any]:
        """Show those who answer from now on."""
        visitor = self._visitor(request)
        try:
            visitor.choose(self._names(who, adapter, beside))
        except QLoRAError as error:
            return [*self._sides(visitor, visitor.look()), _said(str(error), is_refused=True)]
        return [*self._sides(visitor, visitor.look()), ""]

    def lines_of(self, request: gr.Request) -> list[str]:
        """The conversations as lines of JSON, for the browser to save."""
        lines = self._visitor(request).as_lines()
        return [lines, "" if lines else _said(NOTHING_SAID)]

    def leave(self, request: gr.Request) -> None:
        """Stop and forget a tab that was closed."""
        visitor = self.visitors.pop(str(request.session_hash), None)
        if visitor is not None:
            visitor.stop()

    def _answers(
        self,
        ask: Callable[[Visitor, DecodingConfig, str | None], Iterator[Look]],
        question: str,
        controls: tuple[Any, ...],
        request: gr.Request,
    ) -> Iterator[list[Any]]:
        visitor = self._visitor(request)
        who, adapter, beside, system, *drawing = controls
        look, is_first = visitor.look(), True
        looks: Any = None
        try:
            visitor.choose(self._names(who, adapter, beside))
            looks = ask(visitor, _drawing(*drawing).config(self.decoding), system.strip() or None)
            for look in looks:
                yield self._shown(visitor, look, "" if is_first else None, is_writing=True)
                is_first = False
        except QLoRAError as error:
            look = Look(visitor.look().sides, str(error), is_refused=True)
        except Exception:
            logger.exception("An answer failed.")
            look = Look(visitor.look().sides, FAILED, is_refused=True)
        finally:
            if looks is not None:
                looks.close()  # stops the answer, where nobody looks any more
        yield self._shown(visitor, look, question if look.is_refused else None, is_writing=False)

    def _shown(
        self, visitor: Visitor, look: Look, question: str | None, is_writing: bool
    ) -> list[Any]:
        return [
            *self._sides(visitor, look),
            _said(look.said, look.is_refused),
            gr.skip() if question is None else question,
            gr.update(visible=not is_writing),
            gr.update(visible=is_writing),
            *(gr.update(interactive=not is_writing) for _ in self._at_rest()),
        ]

    def _at_rest(self) -> list[Any]:
        """What can be used only while no answer is written."""
        return [self.retry, self.clear, self.save, self.who, self.adapter, self.beside]

    def _sides(self, visitor: Visitor, look: Look) -> list[Any]:
        classes = ["side", "is-beside"] if len(look.sides) > 1 else ["side"]
        shown = [
            gr.update(
                value=_messages(turns, chat),
                label=self._label(chat.name),
                visible=True,
                elem_classes=classes,
            )
            for chat, turns in zip(visitor.chats, look.sides, strict=True)
        ]
        empty = range(len(shown), len(self.sides))
        return [*shown, *(gr.update(value=[], visible=False) for _ in empty)]

    def _visitor(self, request: gr.Request) -> Visitor:
        key = str(request.session_hash)
        if key not in self.visitors:
            names = self._names(WHO[0], None, BASE)
            self.visitors[key] = Visitor(self.model, self._queue, self.decoding, names)
        return self.visitors[key]

    def _names(self, who: Who, adapter: str | None, beside: str) -> list[str]:
        return names_of(self.model.adapters, who, adapter, beside)

    def _label(self, name: str) -> str:
        return "base, adapter off" if name == BASE and self.model.adapters else name


def _drawing(
    do_sample: bool, temperature: float, top_p: float, top_k: int, penalty: float, length: int
) -> Drawing:
    return Drawing(
        do_sample=do_sample,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=penalty,
        max_new_tokens=length,
    )


def _messages(turns: list[Message], chat: Chat) -> list[dict[str, str]]:
    """Turns as Gradio knows them; another's answers say whose they are."""
    shown = []
    for place, turn in enumerate(turns):
        text = as_markdown(turn.content)
        whose = chat.inherited[place] if place < len(chat.inherited) else chat.name
        if turn.role == "assistant" and whose != chat.name:
            text = f"*{whose}:*\n\n{text}"
        shown.append({"role": turn.role, "content": text})
    return shown


def _said(text: str, is_refused: bool = False) -> str:
    return f'<div class="{"is-refused" if is_refused else ""}">{as_html(text)}</div>'
