"""`herd pull`: a model from the Hugging Face hub."""

from __future__ import annotations

from typing import Annotated

import typer

from herd.cli.output import emit


def command(
    repository: Annotated[str, typer.Argument(metavar="REPO", help="Repository on the hub: OWNER/NAME.")],
    file: Annotated[str | None, typer.Argument(metavar="[FILE]", help="One file of it, for example a GGUF.")] = None,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit.")] = "main",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Download a model, or go on with a download that stopped. Every file is checked against the hub's hash.

    The model can then be used by its repository's name in every other verb. HF_TOKEN gives access to gated
    repositories, HF_ENDPOINT names another hub, HERD_HOME another place for the files.

    Examples:

        herd pull meta-llama/Llama-3.2-1B-Instruct

        herd pull bartowski/Llama-3.2-1B-Instruct-GGUF Llama-3.2-1B-Instruct-Q8_0.gguf

        herd chat meta-llama/Llama-3.2-1B-Instruct
    """
    from herd import checkpoint

    path = checkpoint.pull(repository, file, revision=revision)
    emit({"repository": repository, "path": path}, as_json, lambda: print(path))
