"""Code Llama 70B Instruct: every message has a source, and ends with the control token <step>.

    <s> ( " Source: role" ["\\nDestination: user"] "\\n\\n " content <step> )*
    then, for an answer, " Source: assistant\\nDestination: user" "\\n\\n "

Head and body are encoded apart, each as a text of its own. Source: `dialog_prompt_tokens` in meta-llama/codellama
`llama/generation.py`. There the caller gives an answer's destination; here it is always the user.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from herd.errors import UsageError
from herd.tokenizer.chat.inst import TAGS, check_alternation, refuse_tags, refuse_tools
from herd.tokenizer.chat.messages import DialogWriter, Encoded, Turn
from herd.tokenizer.vocabulary import Vocabulary

_ANSWER = " Source: assistant\nDestination: user"


@dataclass(frozen=True)
class StepFormat:
    """The format of Code Llama 70B Instruct."""

    name: str = "codellama-70b"

    controls = ("<s>", "<step>")

    def encode(
        self, vocabulary: Vocabulary, turns: list[Turn], tools: Sequence[object] | None, add_generation_prompt: bool
    ) -> Encoded:
        refuse_tools(self.name, turns, tools)
        refuse_tags(self.name, turns, (*TAGS, "<step>"))
        if turns[0].role != "system":
            turns = [Turn("system", ""), *turns]
        check_alternation(self.name, turns[1:])
        if add_generation_prompt and turns[-1].role != "user":
            raise UsageError(
                f"in {self.name} an answer follows a user's message",
                value=turns[-1].role,
                allowed="user as the last role",
            )
        writer = DialogWriter(vocabulary)
        writer.control("<s>")
        for turn in turns:
            own = turn.role == "assistant"
            writer.text(_ANSWER if own else f" Source: {turn.role}")
            if turn.content:
                writer.text("\n\n")
                writer.continuation(f" {turn.content.strip()}", own)
            writer.control("<step>", own)
        if add_generation_prompt:
            writer.text(_ANSWER)
            writer.text("\n\n ")
        return writer.encoded()

    @property
    def template(self) -> str:
        # After a control token other tools put one space before the text; the other spaces are written here.
        return (
            "{%- if tools %}{{- raise_exception('This format knows no tools') }}{%- endif %}"
            "{{- bos_token }}"
            "{%- if messages[0]['role'] != 'system' %}{{- ' Source: system<step>' }}{%- endif %}"
            "{%- for message in messages %}"
            "{{- ' Source: ' + message['role'] }}"
            "{%- if message['role'] == 'assistant' %}{{- '\\nDestination: user' }}{%- endif %}"
            "{%- if message['content'] %}{{- ' \\n\\n ' + message['content'] | trim }}{%- endif %}"
            "{{- '<step>' }}"
            "{%- endfor %}"
            "{%- if add_generation_prompt %}{{- ' Source: assistant\\nDestination: user \\n\\n ' }}{%- endif %}"
        )


CODE_LLAMA_70B = StepFormat()
