"""Render conversations with a model's chat template: prompts up to where the answer begins, and answers as the template
writes them, up to the token that ends a turn.

Training must see what is sampled later, so the template alone decides: it may trim an answer, put an empty thought before
it, or open a thought in the prompt. A conversation that it cannot show whole raises ConfigError.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import repeat
from typing import Any

import jinja2

from frpo_nemo.data.conversations import THOUGHTS, TOOLS, thoughts
from frpo_nemo.data.tokenizer import check_ids
from frpo_nemo.errors import ConfigError

Tools = list[dict[str, Any]] | None

_ANSWER = "frpo-answer"  # stands for an answer where only what the template writes around it matters
_ID = "frpo00000"  # stands for the id of a tool call, where only its form matters; some templates want nine characters
_LAST_TAG = re.compile(r"[<\[][^<>\[\]]+[>\]]\s*\Z")


@dataclass(frozen=True)
class Chat:
    """Render and tokenize with a tokenizer's chat template. template_args: variables of the template, such as
    enable_thinking. moment: the time on the template's clock; None: now. vocab_size: rows of the model's embedding;
    None: unknown, so ids are not checked."""

    tokenizer: Any
    template_args: dict[str, Any] = field(default_factory=dict)
    moment: datetime | None = None
    vocab_size: int | None = None

    @classmethod
    def of(cls, tokenizer) -> Chat:
        """Return `tokenizer` if it is a Chat already, else a Chat of it with the defaults."""
        return tokenizer if isinstance(tokenizer, Chat) else cls(tokenizer)

    def check(self) -> None:
        """Raise ConfigError when prompts cannot be rendered or answers cannot end with this tokenizer."""
        tokenizer = self.tokenizer
        if not tokenizer.chat_template:
            raise ConfigError(
                f"the tokenizer of '{tokenizer.name_or_path}' has no chat template: take an "
                "instruction-tuned checkpoint, or put a chat_template.jinja into the folder of its tokenizer files"
            )
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"the tokenizer of '{tokenizer.name_or_path}' has no EOS token, so no answer can end: "
                "set eos_token in its tokenizer_config.json"
            )
        if self._after_answer == "":
            raise ConfigError(
                f"the chat template of '{tokenizer.name_or_path}' writes nothing after an answer, so that a model would not "
                f"learn where its answers end: let it write {tokenizer.eos_token} there"
            )
        for name in self.template_args:
            if not re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)):
                raise ConfigError(
                    f"model.chat_template_args.{name}: the chat template of '{tokenizer.name_or_path}' never reads {name}"
                )

    def render(self, messages: list[dict], where: str, *, prompt: bool, tools: Tools = None) -> str:
        """Return a conversation as the template writes it. Some templates want the arguments of a tool call as objects, which
        they write as JSON; others want JSON text, which they write as it is. Raises ConfigError when the template refuses
        a message, or leaves one out."""
        if tools and not re.search(r"\btools\b", str(self.tokenizer.chat_template)):
            raise ConfigError(
                f"{where}: the row has definitions of tools, and the chat template of '{self.tokenizer.name_or_path}' never "
                f"reads them; put them into a message and rename the column {TOOLS}, or use another template"
            )
        problems = []
        for form in (_with_arguments(messages, _as_object), _with_arguments(messages, _as_text)):
            try:
                text = self._apply_to_nulls(form, where, prompt, tools)
            except ConfigError as problem:
                problems.append(problem)
                continue
            missing = self._left_out(form, prompt)
            if not missing:
                return text
            problems.append(
                ConfigError(
                    f"{where}: the chat template of '{self.tokenizer.name_or_path}' shows nothing of {missing}; write "
                    "it in a way that the template knows, or use another template"
                )
            )
        raise problems[0]

    def prompt_ids(
        self, conversations: Sequence[list[dict]], where: str, tools: Iterable[Tools] = repeat(None)
    ) -> list[list[int]]:
        """Return the token ids of every conversation up to the place where the assistant's answer begins. tools: the
        definitions of those that each may call. Raises ConfigError."""
        pairs = zip(conversations, tools, strict=False)
        texts = [self.render(c, _named(where, c), prompt=True, tools=t) for c, t in pairs]
        return self._checked(self._tokenize(texts), where)

    def examples(
        self, conversations: Sequence[tuple[list[dict], dict]], where: str, tools: Iterable[Tools] = repeat(None)
    ) -> list[tuple[list[int], list[int]]]:
        """Return (prompt ids, answer ids) of (messages, the assistant's answer) pairs: prompts as `prompt_ids` gives
        them, answers with the token that ends a turn. Raises ConfigError."""
        pairs = zip(conversations, tools, strict=False)
        rows = [self._prompt_and_answer(m, a, _named(where, m), t) for (m, a), t in pairs]
        prompt_ids = self._tokenize([prompt for prompt, _, _ in rows])
        whole_ids = self._tokenize([prompt + answer for prompt, answer, _ in rows])
        answer_ids = []
        for prompt, whole, (_, answer, ended) in zip(prompt_ids, whole_ids, rows, strict=True):
            # A sampler continues fixed prompt ids: where tokens would merge across the border, the answer stands alone.
            ids = whole[len(prompt) :] if whole[: len(prompt)] == prompt else self._tokenize([answer])[0]
            answer_ids.append(ids if ended else [*ids, self.tokenizer.eos_token_id])
        self._checked(prompt_ids + answer_ids, where)
        return list(zip(prompt_ids, answer_ids, strict=True))

    @functools.cached_property
    def end_tokens(self) -> set[int]:
        """Return the tokens that end a turn: EOS, and the first special token that the template writes after an answer."""
        return {self.tokenizer.eos_token_id, *(self._tokenize([self._end])[0][-1:] if self._end else [])}

    @property
    def _tail(self) -> str:
        return self._after_answer or ""

    @functools.cached_property
    def _after_answer(self) -> str | None:
        """Return what the template writes after an answer; None if it does not show one."""
        conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
        try:
            text = self.render(conversation, "a conversation", prompt=False)
        except ConfigError:
            return None  # it needs more than a question and an answer
        return text.rpartition(_ANSWER)[2] if _ANSWER in text else None

    @functools.cached_property
    def _special(self) -> re.Pattern[str]:
        """Return a pattern that matches any special token's text."""
        special = [re.escape(t.content) for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        return re.compile("|".join(special or [re.escape(self.tokenizer.eos_token)]))

    @functools.cached_property
    def _end(self) -> str:
        """Return `_tail` up to its first special token; "" if it has none."""
        found = self._special.search(self._tail)
        return self._tail[: found.end()] if found else ""

    def _prompt_and_answer(self, messages: list[dict], answer: dict, where: str, tools: Tools) -> tuple[str, str, bool]:
        """Return (prompt, answer, whether the answer ends in the token that ends a turn). Prompt and answer together are
        the beginning of the whole conversation's rendering."""
        answer = self._without_end(answer)
        prompt = self.render(messages, where, prompt=True, tools=tools)
        whole = self.render([*messages, answer], where, prompt=False, tools=tools)
        body, end, ended = self._parted(whole)
        opener = _LAST_TAG.search(prompt)
        if whole.startswith(prompt):
            text = body[len(prompt) :]
            doubled = (
                opener
                and opener[0].strip() in text
                and (answer["content"] or "").lstrip().startswith(opener[0].strip())
            )
            if not doubled:
                self._check_complete(body, answer, len(prompt), where)
                return prompt, text + end, ended
        elif not opener or not whole.startswith(prompt[: opener.start()]):
            raise ConfigError(
                f"{where}: the chat template of '{self.tokenizer.name_or_path}' writes a conversation differently when its "
                "answer follows, so no answer can be learned after the prompt; use a template whose prompts are the "
                "beginning of conversations"
            )
        return prompt, self._after_opener(answer, opener[0], where) + end, ended

    def _parted(self, whole: str) -> tuple[str, str, bool]:
        """Return (a conversation without what ends its last turn, that end, whether it ends in a special token)."""
        if whole.endswith(self._tail):
            return whole.removesuffix(self._tail), self._end or self._tail.rstrip(), bool(self._end)
        whole = whole.rstrip()  # a tool call may end differently from an answer
        last = [found for found in self._special.finditer(whole) if found.end() == len(whole)]
        return whole, "", bool(last)

    def _after_opener(self, answer: dict, opener: str, where: str) -> str:
        """Return an answer with its thoughts, for a template that opens thoughts in the prompt and leaves them out of
        conversations."""
        tag, content = opener.strip(), answer["content"] or ""
        thought = thoughts(answer)
        closing = f"{tag[0]}/{tag[1:]}"
        text = f"{tag}\n{thought}\n{closing}\n\n{content}" if thought else content.lstrip()
        if not text.startswith(tag) or answer.get("tool_calls"):
            raise ConfigError(
                f"{where}: the chat template of '{self.tokenizer.name_or_path}' opens {tag} in the prompt, and the answer "
                f"does not begin with it: {content[:60]!r}; let answers begin with their thoughts, those without any with "
                f"{tag}\\n\\n{closing}\\n\\n (completion may be a template), or use a template that does not open it"
            )
        return (text.removeprefix(opener) if text.startswith(opener) else text.removeprefix(tag)).rstrip()

    def _check_complete(self, body: str, answer: dict, begin: int, where: str) -> None:
        """Raise ConfigError when the template leaves out a part of the answer, which would not be learned."""
        shown, prompt = _squeezed(body), len(_squeezed(body[:begin]))
        for key, text in (("content", answer["content"] or ""), ("thoughts", thoughts(answer))):
            found = shown.rfind(_squeezed(text))
            if found < 0 or found + len(_squeezed(text)) < prompt:
                raise ConfigError(
                    f"{where}: the chat template of '{self.tokenizer.name_or_path}' leaves out the answer's {key}, "
                    f"{text[:60]!r}; put it where the template shows it, or use another template"
                )

    def _without_end(self, answer: dict) -> dict:
        """Return the answer without the end of a turn, which data may contain and the template writes as well. Templates
        look for thoughts under different keys, so the answer has all of these keys."""
        content, ends = answer["content"], {self.tokenizer.eos_token, self._end.strip()} - {""}
        while content and (end := next((e for e in ends if content.rstrip().endswith(e)), None)):
            content = content.rstrip().removesuffix(end)
        thought = thoughts(answer)
        return {**(dict.fromkeys(THOUGHTS, thought) if thought else {}), **answer, "content": content}

    def _left_out(self, messages: list[dict], prompt: bool) -> str:
        """Return the part of a conversation of which the template shows nothing; "" if none. That depends on roles and their
        order, not on the text of the messages."""
        marked, marks = _marked(messages)
        shape = json.dumps([prompt, marked])
        if shape not in self._shapes:
            try:
                text = self._apply_to_nulls(marked, "", prompt)
            except ConfigError:  # the template reads the texts
                text = "".join(marks)
            self._shapes[shape] = next((what for mark, what in marks.items() if mark not in text), "")
        return self._shapes[shape]

    @functools.cached_property
    def _shapes(self) -> dict[str, str]:
        """Return the results of `_left_out` so far: shape of a conversation -> part."""
        return {}

    def _apply_to_nulls(self, messages: list[dict], where: str, prompt: bool, tools: Tools = None) -> str:
        """Render messages of which some have null content, which marks a tool call: many templates ask for null there, the
        others would print "None"."""
        nothing = [m | {"content": m["content"] or ""} for m in messages]
        empty = self._apply(nothing, where, prompt, tools)
        if all(m["content"] is not None for m in messages):
            return empty
        try:
            text = self._apply(messages, where, prompt, tools)
        except ConfigError:
            return empty
        return empty if text.count("None") > empty.count("None") else text

    def _apply(self, messages: list[dict], where: str, prompt: bool, tools: Tools) -> str:
        clock = {"strftime_now": self.moment.strftime} if self.moment else {}
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools, add_generation_prompt=prompt, tokenize=False, **clock, **self.template_args
            )
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError) as problem:
            raise ConfigError(
                f"{where}: the chat template of '{self.tokenizer.name_or_path}' refuses a message: {problem}"
            ) from problem

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of rendered texts. A template writes its own BOS, so the tokenizer must not add another."""
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def _checked(self, sequences: list[list[int]], where: str) -> list[list[int]]:
        if self.vocab_size is not None:
            check_ids(sequences, self.tokenizer, self.vocab_size, where)
        return sequences


def _named(where: str, messages: list[dict]) -> str:
    """Return `where` and the beginning of the conversation's last message: rows have no number once some are left out."""
    return f"{where}, {str(messages[-1]['content'])[:40]!r}"


def _with_arguments(messages: list[dict], convert: Callable[[Any], Any]) -> list[dict]:
    """Return messages with the arguments of tool calls converted."""

    def converted(call: dict) -> dict:
        if "function" in call:
            return call | {"function": converted(call["function"])}
        return call | {"arguments": convert(call["arguments"])} if "arguments" in call else call

    return [m | {"tool_calls": [*map(converted, m["tool_calls"])]} if m.get("tool_calls") else m for m in messages]


def _as_object(arguments: Any) -> Any:
    try:
        found = json.loads(arguments)
    except (TypeError, ValueError):
        return arguments
    return found if isinstance(found, dict) else arguments


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _marked(messages: list[dict]) -> tuple[list[dict], dict[str, str]]:
    """Return (messages of the same shape whose texts are marks, {mark: the part whose text it is})."""
    marks: dict[str, str] = {}

    def mark(part: str) -> str:
        marks[f"frpo_{len(marks)}_"] = part
        return next(reversed(marks))

    def marked_call(call: dict, i: int) -> dict:
        if "function" in call:
            return {"id": _ID, "type": "function", "function": marked_call(call["function"], i)}
        return {"name": mark(f"a call of tools in message {i}"), "arguments": type(call.get("arguments", {}))()}

    marked = []
    for i, message in enumerate(messages):
        copy: dict[str, Any] = {key: _ID for key in ("name", "tool_call_id") if key in message}
        calls = message.get("tool_calls")
        if calls:  # templates may leave out text next to them
            copy |= {"content": message["content"] and "", "tool_calls": [marked_call(call, i) for call in calls]}
        else:
            copy["content"] = mark(f"message {i} (role {message['role']!r})")
        marked.append({"role": message["role"], **copy})
    return marked, marks


def _squeezed(text: str) -> str:
    return "".join(text.split())
