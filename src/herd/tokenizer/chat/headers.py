"""Llama 3, 3.1, 3.2, 3.3 and 4: a header with the role before each message, an end-of-turn token after it.

    <|begin_of_text|> ( <|start_header_id|> role <|end_header_id|> "\\n\\n" content <|eot_id|> )*

Role, newlines and content are encoded one by one, as Meta's code does. One grammar, five rows of data.
Sources: `ChatFormat` in meta-llama/llama3 `llama/tokenizer.py`, meta-llama/llama-models `models/llama3/chat_format.py`
and `models/llama4/chat_format.py`; prompt_format.md of each for what surrounds tool calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from herd.errors import UsageError
from herd.tokenizer.chat import tools as tool_text
from herd.tokenizer.chat.messages import Call, DialogWriter, Encoded, Turn
from herd.tokenizer.chat.tools import Tools, check_tools
from herd.tokenizer.vocabulary import Vocabulary

_BOS = "<|begin_of_text|>"


@dataclass(frozen=True)
class HeaderFormat:
    """One generation of the grammar above."""

    name: str
    header_start: str = "<|start_header_id|>"
    header_end: str = "<|end_header_id|>"
    end_of_turn: str = "<|eot_id|>"
    end_of_message: str = "<|eom_id|>"  # the assistant waits for a tool's answer
    python: tuple[str, ...] = ("<|python_tag|>",)  # before (and in Llama 4 after) what is to be executed
    calls: Literal["none", "json", "pythonic"] = "json"
    built_in_tools: bool = True
    strips_content: bool = False  # the first Llama 3's code strips it, later code does not
    messages_end_calls: bool = False  # Llama 4: every call and every tool's answer ends with end_of_message

    @property
    def controls(self) -> tuple[str, ...]:
        return (_BOS, self.header_start, self.header_end, self.end_of_turn)

    def encode(
        self, vocabulary: Vocabulary, turns: list[Turn], tools: Sequence[object] | None, add_generation_prompt: bool
    ) -> Encoded:
        turns = self._with_tools(self._one_by_one(turns), check_tools(tools))
        executes = any(turn.role == "system" and tool_text.ENVIRONMENT in turn.content for turn in turns)
        writer = DialogWriter(vocabulary)
        writer.control(_BOS)
        for turn in turns:
            self._message(writer, turn, executes)
        if add_generation_prompt:
            self._header(writer, "assistant")
        return writer.encoded()

    def _one_by_one(self, turns: list[Turn]) -> list[Turn]:
        """Calls that do not fit in one message become messages of their own, each before what it gave.

        What the calls of a message gave follows it in their order.
        """
        found: list[Turn] = []
        rest: list[Call] = []  # of a message whose first calls are in `found`
        for turn in turns:
            if turn.role != "tool":
                found += [Turn("assistant", "", (call,)) for call in rest]
                rest = [] if self._fit_together(turn.calls) else list(turn.calls[1:])
                turn = replace(turn, calls=turn.calls[:1]) if rest else turn
            elif found and found[-1].role == "tool" and rest:
                found.append(Turn("assistant", "", (rest.pop(0),)))
            found.append(turn)
        return found + [Turn("assistant", "", (call,)) for call in rest]

    def _fit_together(self, calls: tuple[Call, ...]) -> bool:
        """Whether one message can have all of them: in Python's form, functions that are not built in."""
        pythonic = (call.name not in tool_text.BUILT_IN and tool_text.is_pythonic(call) for call in calls)
        return len(calls) < 2 or (self.calls == "pythonic" and all(pythonic))

    def _header(self, writer: DialogWriter, role: str) -> None:
        writer.control(self.header_start)
        writer.text("ipython" if role == "tool" else role)
        writer.control(self.header_end)
        writer.text("\n\n")

    def _message(self, writer: DialogWriter, turn: Turn, executes: bool) -> None:
        own = turn.role == "assistant"
        self._header(writer, turn.role)
        writer.text(turn.content.strip() if self.strips_content else turn.content, own)
        waits = self._calls(writer, turn.calls, executes) if turn.calls else False
        if self.messages_end_calls and (turn.calls or turn.role == "tool"):
            waits = True
        writer.control(self.end_of_message if waits else self.end_of_turn, own)

    def _calls(self, writer: DialogWriter, calls: tuple[Call, ...], executes: bool) -> bool:
        """Write the assistant's calls; says whether it then waits for an answer within its turn."""
        self._refuse_tools("tool calls")
        first = calls[0]  # the only one, but in Python's form
        if first.name == tool_text.CODE_INTERPRETER:
            return self._tagged(writer, tool_text.code_call(first))
        if first.name in tool_text.BUILT_IN and self.built_in_tools:
            return self._tagged(writer, tool_text.search_call(first))
        if self.calls == "pythonic" and tool_text.is_pythonic(first):
            writer.text(tool_text.pythonic_calls(calls), True)
            return False
        if executes:
            return self._tagged(writer, tool_text.json_call(first))
        writer.text(tool_text.json_call(first), True)
        return False

    def _tagged(self, writer: DialogWriter, text: str) -> bool:
        writer.control(self.python[0], True)
        writer.text(text, True)
        for closing in self.python[1:]:
            writer.control(closing, True)
        return True

    def _with_tools(self, turns: list[Turn], tools: Tools) -> list[Turn]:
        """Describe the tools in the system prompt, and in 3.1 the functions in a user message after it."""
        if not tools.built_in and not tools.functions:
            return turns
        self._refuse_tools("tools")
        if tools.built_in and not self.built_in_tools:
            raise UsageError(
                f"{self.name} has no built-in tools",
                value=", ".join(tools.built_in),
                allowed="functions with a name, a description and parameters",
            )
        parts = [tool_text.environment_lines(tools, always=self.calls == "json")]
        if tools.functions and self.calls == "pythonic":
            parts.append(tool_text.pythonic_instructions(tools))
        rest = turns
        if turns and turns[0].role == "system":
            parts.append(turns[0].content)
            rest = turns[1:]
        system = Turn("system", "\n\n".join(part for part in parts if part))
        if tools.functions and self.calls == "json":
            return [system, Turn("user", tool_text.json_instructions(tools)), *rest]
        return [system, *rest]

    def _refuse_tools(self, what: str) -> None:
        if self.calls == "none":
            raise UsageError(
                f"{self.name} knows no {what}", allowed="chat_format llama3.1, llama3.2, llama3.3 or llama4"
            )

    @property
    def template(self) -> str:
        content = "message['content']" + (" | trim" if self.strips_content else "")
        end = f"'{self.end_of_turn}'"
        if self.messages_end_calls:
            end = f"'{self.end_of_message}' if is_tool else {end}"
        return (
            "{{- bos_token }}"
            "{%- if tools %}{{- raise_exception('This template writes plain dialogues, without tools') }}{%- endif %}"
            "{%- for message in messages %}"
            "{%- if message['tool_calls'] %}"
            "{{- raise_exception('This template writes plain dialogues, without tool calls') }}{%- endif %}"
            "{%- set is_tool = message['role'] in ['tool', 'ipython'] %}"
            "{%- set role = 'ipython' if is_tool else message['role'] %}"
            f"{{{{- '{self.header_start}' + role + '{self.header_end}\\n\\n' }}}}"
            f"{{{{- {content} }}}}"
            f"{{{{- {end} }}}}"
            "{%- endfor %}"
            "{%- if add_generation_prompt %}"
            f"{{{{- '{self.header_start}assistant{self.header_end}\\n\\n' }}}}"
            "{%- endif %}"
        )


LLAMA3 = HeaderFormat("llama3", calls="none", strips_content=True)
LLAMA3_1 = HeaderFormat("llama3.1")
LLAMA3_2 = HeaderFormat("llama3.2", calls="pythonic")
LLAMA3_3 = replace(LLAMA3_2, name="llama3.3")
LLAMA4 = HeaderFormat(
    "llama4",
    header_start="<|header_start|>",
    header_end="<|header_end|>",
    end_of_turn="<|eot|>",
    end_of_message="<|eom|>",
    python=("<|python_start|>", "<|python_end|>"),
    calls="pythonic",
    built_in_tools=False,
    messages_end_calls=True,
)
