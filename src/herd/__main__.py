"""`python -m herd` is the `herd` command, which is how torchrun starts it on every rank."""

from herd.cli import main

main()
