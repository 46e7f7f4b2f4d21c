"""Chat templates: messages to the text and the ids of a prompt.

A template is Jinja, as in Hugging Face's `chat_template`; it may come with weights of others, so
it runs in a sandbox. What users, systems and tools write is data: where it spells a control token
it is encoded as plain bytes. To that end every character that begins a control token is exchanged
in their text, before the template sees it, for a stand-in that occurs nowhere else. The control
tokens in the rendered text are then the template's own (and the assistant's, whose `<think>`
counts); the stand-ins go back before the plain text between them is encoded. Hence a template
that looks in what others wrote for a control token, or for a character that begins one, finds none.
"""

import json
import re
import reprlib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from v3jax.data.tokenizer import BOS, EOS, PAD, Tokenizer

ROLES = ("system", "user", "assistant", "tool")

# The format of the V3 family. The template that its R1-type releases carry renders the same, but
# for three faults in conversations with several rounds of tools, mended here: it remembers from
# an earlier round that tool calls, and tool outputs, were begun, so that later calls lose their
# opening tokens and the assistant's text, and later outputs their opening token; and it leaves
# outputs unclosed when more calls or a user's turn follow them.
DEFAULT_TEMPLATE = r"""
{#- One turn follows another without separators; control tokens tell who speaks.
    System messages come first, wherever they stand. -#}
{{- bos_token -}}
{{- messages | selectattr("role", "equalto", "system") | map(attribute="content") | join("\n\n") -}}
{%- set turns = messages | rejectattr("role", "equalto", "system") | list -%}

{%- macro write_call(call) -%}
  {%- set arguments = call.function.arguments -%}
  {{- "<｜tool▁call▁begin｜>" + call.type + "<｜tool▁sep｜>" + call.function.name -}}
  {{- "\n```json\n" + (arguments if arguments is string else arguments | tojson) + "\n```" -}}
  {{- "<｜tool▁call▁end｜>" -}}
{%- endmacro -%}

{%- for turn in turns -%}
  {%- set after_tools = not loop.first and loop.previtem.role == "tool" -%}
  {%- if turn.role == "user" -%}
    {{- "<｜User｜>" + turn.content -}}

  {%- elif turn.role == "tool" -%}
    {#- Outputs that follow one another share one block. -#}
    {{- "" if after_tools else "<｜tool▁outputs▁begin｜>" -}}
    {{- "<｜tool▁output▁begin｜>" + turn.content + "<｜tool▁output▁end｜>" -}}
    {{- "<｜tool▁outputs▁end｜>" if loop.last or loop.nextitem.role != "tool" else "" -}}

  {%- else -%}
    {#- After tool outputs the assistant's turn goes on, without a token that opens it. -#}
    {{- "" if after_tools else "<｜Assistant｜>" -}}
    {%- if turn.tool_calls -%}
      {{- turn.content or "" -}}
      {{- "<｜tool▁calls▁begin｜>" -}}
      {%- for call in turn.tool_calls -%}
        {{- "" if loop.first else "\n" -}}
        {{- write_call(call) -}}
      {%- endfor -%}
      {{- "<｜tool▁calls▁end｜>" -}}
    {%- elif after_tools -%}
      {{- turn.content -}}
    {%- else -%}
      {#- Reasoning of a finished turn is no part of what follows. -#}
      {{- turn.content.split("</think>") | last -}}
    {%- endif -%}
    {{- eos_token -}}
  {%- endif -%}
{%- endfor -%}

{%- if add_generation_prompt and not (turns and turns[-1].role == "tool") -%}
  {{- "<｜Assistant｜>" -}}
{%- endif -%}
""".strip()


class ChatTemplate:
    """A chat template with the tokenizer of its model.

    Args:
      source: Jinja text, `DEFAULT_TEMPLATE` or what `load_template` found.
      origin: what errors call the template, such as its file.

    Raises:
      ValueError: the source is no Jinja template.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, origin: str = "chat template") -> None:
        self._tokenizer = tokenizer
        self._origin = origin
        self._beginnings = {ord(spelling[0]) for spelling in tokenizer.control_ids}
        self._known_characters = {*source, *"".join(tokenizer.control_ids)}
        spelled = set(re.findall(r"<｜[^｜<>\s]+｜>", source))
        self._lacking = spelled - tokenizer.control_ids.keys()
        try:
            self._template = _environment().from_string(source)
        except Exception as error:  # deep nesting fails in Python's own compiler
            raise ValueError(f"{origin}: not a Jinja template ({_one_line(error)})") from None

    def render(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation.

        Args:
          messages: in Hugging Face's and OpenAI's form, as JSON would hold them: `role` is one of
            `ROLES`; `content` a string, or None beside an assistant's `tool_calls`, each of which
            is `{"function": {"name": str, "arguments": JSON text or dict}}`.
          add_generation_prompt: end with what opens the assistant's next turn.

        Raises:
          ValueError: a message lacks something, or the template fails on the conversation.
        """
        text, restored = self._render(messages, add_generation_prompt)
        return text.translate(restored)

    def encode(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """The ids of a conversation: those of `render`'s text, with nobody's control tokens in it
        but the template's and the assistant's.

        Raises:
          ValueError: as `render`; or the template writes a control token of the V3 family that the
            tokenizer does not have; or the text is not valid Unicode.
        """
        text, restored = self._render(messages, add_generation_prompt)
        return self._encoded(text, restored)

    def encode_turns(
        self, messages: Sequence[dict[str, Any]]
    ) -> list[list[tuple[list[int], bool]]]:
        """What a conversation gives to train on: texts, each as pieces of ids in order, and whether
        the assistant said them, the token that ends its turn included.

        All turns are in one text, as the template writes the conversation. A turn that it writes
        otherwise once more follows, or not in full, such as reasoning that it drops from finished
        turns, makes a text of its own, which ends with it. A piece is encoded by itself, as the
        prompt is when the model is asked.

        Raises:
          ValueError: as `encode`; or the conversation lacks an assistant's turn, or has an empty
            one; or the template does not open a turn as `add_generation_prompt` does.
        """
        conversation = checked(messages)
        stand_ins = self._stand_ins(conversation)

        def text(n_messages: int, opened: bool) -> str:
            return self._rendered(conversation[:n_messages], stand_ins, opened)

        whole, spans, found = text(len(conversation), False), [], []
        for i, message in enumerate(conversation):
            if message["role"] != "assistant":
                continue
            content = message["content"] or ""
            if not content and "tool_calls" not in message:
                raise ValueError(f"messages[{i}]: the assistant says nothing; drop the turn")
            before, after = text(i, True), text(i + 1, False)
            if not after.startswith(before):
                raise ValueError(
                    f"{self._origin}: does not open messages[{i}] as it opens a turn to generate; "
                    "use another template"
                )
            span = (len(before), len(after))
            if content.strip() not in after[span[0] :]:
                if "tool_calls" in message:
                    raise ValueError(
                        f"{self._origin}: leaves out what messages[{i}] says beside its calls; "
                        "use another template"
                    )
                after = f"{before}{content}{EOS}"
                found.append((after, [(len(before), len(after))]))
            elif whole.startswith(after):
                spans.append(span)
            else:
                found.append((after, [span]))
        if spans:
            found.append((whole[: spans[-1][1]], spans))
        if not found:
            raise ValueError("messages: no assistant's turn to learn; give one")
        restored = {new: old for old, new in stand_ins.items()}
        return [
            [(self._encoded(piece, restored), said) for piece, said in _cut(text, spans)]
            for text, spans in found
        ]

    def _encoded(self, text: str, restored: dict[int, int]) -> list[int]:
        """The ids of a rendered text with stand-ins."""
        for token in sorted(self._lacking):
            if token in text:
                raise ValueError(
                    f"{self._origin}: writes {token}, which the tokenizer does not have; "
                    "use a tokenizer with it or leave out what needs it"
                )
        pieces = self._tokenizer.split_controls(text)
        return self._tokenizer.encode_pieces((t.translate(restored), i) for t, i in pieces)

    def _render(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool
    ) -> tuple[str, dict[int, int]]:
        """The rendered text with stand-ins, and the table that exchanges them back."""
        conversation = checked(messages)
        stand_ins = self._stand_ins(conversation)
        text = self._rendered(conversation, stand_ins, add_generation_prompt)
        return text, {new: old for old, new in stand_ins.items()}

    def _rendered(
        self, conversation: list[dict[str, Any]], stand_ins: dict[int, int], opened: bool
    ) -> str:
        """The template's text of checked messages, with stand-ins."""
        try:
            return self._template.render(
                messages=[_guarded(message, stand_ins) for message in conversation],
                tools=None,
                documents=None,
                add_generation_prompt=opened,
                bos_token=BOS,
                eos_token=EOS,
            )
        except Exception as error:  # a template may divide by zero or recurse without end
            raise ValueError(f"{self._origin}: fails here ({_one_line(error)})") from None

    def _stand_ins(self, conversation: list[dict[str, Any]]) -> dict[int, int]:
        """A character for each one that begins a control token; it occurs nowhere here."""
        used = self._known_characters.union(json.dumps(conversation, ensure_ascii=False))
        first, last = 0xE000, 0x10FFFF  # begins with the area for private use
        free = (code for code in range(first, last + 1) if chr(code) not in used)
        table = dict(zip(sorted(self._beginnings), free, strict=False))
        if len(table) < len(self._beginnings):
            raise ValueError("messages: use every character there is from U+E000; use fewer")
        return table


def _cut(text: str, spans: list[tuple[int, int]]) -> list[tuple[str, bool]]:
    """The pieces of a text in order, and whether each is one of `spans`."""
    pieces, at = [], 0
    for start, end in spans:
        pieces += [(text[at:start], False), (text[start:end], True)]
        at = end
    return [(piece, said) for piece, said in pieces if piece]


def load_template(directory: Path) -> str | None:
    """The chat template of a model's folder, None if it has none.

    It is `chat_template.jinja`, else `chat_template` in `tokenizer_config.json`: a string, or the
    one named `default` of several.

    Raises:
      ValueError: the file is damaged.
    """
    file = directory / "chat_template.jinja"
    if file.exists():
        return _read(file)
    file = directory / "tokenizer_config.json"
    if not file.exists():
        return None
    try:
        config = json.loads(_read(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({_one_line(error)}); copy it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: not a JSON object; copy it again")
    found = config.get("chat_template")
    if isinstance(found, list):
        found = _default_of(found)
        if found is None:
            raise ValueError(f"{file}: chat_template: has none named 'default'; name one so")
    if found is None or isinstance(found, str):
        return found
    raise ValueError(f"{file}: chat_template: neither a string nor a list of named ones")


def tokenizer_config(tokenizer: Tokenizer, template: str | None, max_length: int) -> dict[str, Any]:
    """What `tokenizer_config.json` holds beside an exported `tokenizer.json`.

    The class is the general one, for Llama's builds a pre-tokenizer of its own.

    Args:
      max_length: tokens the model was made for.
    """
    assert {BOS, EOS, PAD} <= tokenizer.control_ids.keys()
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": None,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    return config if template is None else config | {"chat_template": template}


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as Hugging Face sets it up for chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter writes it for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def checked(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A copy of plain JSON values: `content` is there, `tool_calls` only if there are some."""
    try:
        conversation = json.loads(json.dumps(messages, ensure_ascii=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"messages: not JSON values ({_one_line(error)}); use dicts, lists and strings"
        ) from None
    if not isinstance(conversation, list) or not conversation:
        raise ValueError("messages: not a list of messages; give at least one")
    for i, message in enumerate(conversation):
        _check_message(f"messages[{i}]", message)
    return conversation


def _check_message(name: str, message: Any) -> None:
    """Refuses a message that no template could render; fills in what may be left out."""
    if not isinstance(message, dict):
        raise ValueError(f"{name}: not a dict; use {{'role': 'user', 'content': 'text'}}")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{name}: role is {reprlib.repr(role)}; use one of {', '.join(ROLES)}")
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
    elif role != "assistant":
        raise ValueError(f"{name}: tool_calls of role {role!r}; only an assistant calls tools")
    elif not isinstance(message["tool_calls"], list):
        raise ValueError(f"{name}: tool_calls is no list; put the calls in one")
    for k, call in enumerate(message.get("tool_calls", [])):
        _check_call(f"{name}: tool_calls[{k}]", call)
    content = message.setdefault("content", None)
    if isinstance(content, str) or (content is None and "tool_calls" in message):
        return
    remedy = "give a string" if content is None else "join its parts to one string"
    raise ValueError(f"{name}: content is no string; {remedy}")


def _check_call(name: str, call: Any) -> None:
    """Refuses a tool call without a function's name and arguments."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{name}: names no function; use {{'function': {{'name': ...}}}}")
    if not isinstance(function.get("arguments"), str | dict):
        raise ValueError(f"{name}: arguments is neither a JSON string nor a dict; give one")
    if not isinstance(call.setdefault("type", "function"), str):
        raise ValueError(f"{name}: type is no string; use 'function'")


def _guarded(message: dict[str, Any], stand_ins: dict[int, int]) -> dict[str, Any]:
    """A message with stand-ins in all its text, but for what an assistant says."""
    kept = {"role"}
    if message["role"] == "assistant":
        kept |= {"content", "reasoning_content"}
    return {
        key: value if key in kept else _exchanged(value, stand_ins)
        for key, value in message.items()
    }


def _exchanged(value: Any, table: dict[int, int], *, keys: bool = False) -> Any:
    """JSON values with their strings translated, and the keys of a tool's arguments."""
    if isinstance(value, str):
        return value.translate(table)
    if isinstance(value, list):
        return [_exchanged(v, table, keys=keys) for v in value]
    if isinstance(value, dict):
        return {
            k.translate(table) if keys else k: _exchanged(v, table, keys=keys or k == "arguments")
            for k, v in value.items()
        }
    return value


def _default_of(templates: list[Any]) -> Any:
    """The template named `default`; None if none is."""
    for entry in templates:
        if isinstance(entry, dict) and entry.get("name") == "default":
            return entry.get("template")
    return None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{file}: cannot be read ({_one_line(error)}); copy it again") from None


def _one_line(error: Exception) -> str:
    """An error's message, shortened, without line breaks; its type if it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__
