"""Llama 2 and Code Llama (7B, 13B, 34B): instructions between [INST] and [/INST], which are text, not tokens.

    ( <s> "[INST] " user " [/INST] " answer " " </s> )*

The system prompt stands in the first instruction between <<SYS>> marks. Since the marks are text, content that holds
one is refused, as in Meta's code. Source: meta-llama/llama and meta-llama/codellama, `llama/generation.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from herd.errors import UsageError
from herd.tokenizer.chat.messages import DialogWriter, Encoded, Turn
from herd.tokenizer.vocabulary import Vocabulary

TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


@dataclass(frozen=True)
class InstFormat:
    """The format, and the marks it refuses in content."""

    name: str
    tags: tuple[str, ...] = TAGS

    controls = ("<s>", "</s>")

    def encode(
        self, vocabulary: Vocabulary, turns: list[Turn], tools: Sequence[object] | None, add_generation_prompt: bool
    ) -> Encoded:
        refuse_tools(self.name, turns, tools)
        refuse_tags(self.name, turns, self.tags)
        system, turns = (turns[0], turns[1:]) if turns[0].role == "system" else (None, turns)
        check_alternation(self.name, turns)
        if add_generation_prompt and turns[-1].role != "user":
            raise UsageError(
                f"in {self.name} an answer follows a user's message",
                value=turns[-1].role,
                allowed="user as the last role",
            )
        writer = DialogWriter(vocabulary)
        for index, turn in enumerate(turns):
            if turn.role == "user":
                content = turn.content
                if index == 0 and system is not None:
                    content = f"<<SYS>>\n{system.content}\n<</SYS>>\n\n{content}"
                writer.control("<s>")
                writer.text(f"[INST] {content.strip()} [/INST]")
            else:
                # Meta encodes instruction and answer as one text. No piece of the vocabulary reaches over the space
                # after [/INST], so encoding them apart gives the same ids and tells them apart.
                writer.continuation(f" {turn.content.strip()} ", True)
                writer.control("</s>", True)
        return writer.encoded()

    @property
    def template(self) -> str:
        tagged = " or ".join(f"'{tag}' in message['content']" for tag in self.tags)
        return (
            "{%- if tools %}{{- raise_exception('This format knows no tools') }}{%- endif %}"
            "{%- for message in messages %}"
            f"{{%- if {tagged} %}}"
            "{{- raise_exception('Content may not hold the marks of the format') }}{%- endif %}"
            "{%- endfor %}"
            "{%- set has_system = messages[0]['role'] == 'system' %}"
            "{%- set turns = messages[1:] if has_system else messages %}"
            "{%- for message in turns %}"
            "{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
            "{{- raise_exception('Roles must alternate: user, assistant, user, …') }}{%- endif %}"
            "{%- if message['role'] == 'user' %}"
            "{%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' if loop.first and has_system"
            " else '' %}"
            "{{- bos_token + '[INST] ' + (system + message['content']) | trim + ' [/INST]' }}"
            "{%- else %}"
            "{{- ' ' + message['content'] | trim + ' ' + eos_token }}"
            "{%- endif %}"
            "{%- endfor %}"
        )


def refuse_tools(name: str, turns: list[Turn], tools: Sequence[object] | None) -> None:
    if tools or any(turn.calls or turn.role == "tool" for turn in turns):
        raise UsageError(f"{name} knows no tools", allowed="chat_format llama3.1, llama3.2, llama3.3 or llama4")


def refuse_tags(name: str, turns: list[Turn], tags: tuple[str, ...]) -> None:
    for index, turn in enumerate(turns):
        for tag in tags:
            if tag in turn.content:
                raise UsageError(
                    f"messages[{index}] holds a mark of the {name} format, so that content could pose as instructions",
                    value=tag,
                    allowed=f"content without {', '.join(tags)}",
                )


def check_alternation(name: str, turns: list[Turn]) -> None:
    roles = [turn.role for turn in turns]
    if not roles or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)):
        raise UsageError(
            f"{name} takes an optional system message, then user and assistant by turns",
            value=", ".join(roles) or "only a system message",
            allowed="user, assistant, user, …",
        )


LLAMA2 = InstFormat("llama2")
CODE_LLAMA = InstFormat("codellama", (*TAGS, "<step>"))
